"""Attention over all tokens: softmax with a gate, and without softmax."""

from degmix_kernels.attention.entry import OPS
from degmix_kernels.attention.module import GatedAttention, LinearAttention
from degmix_kernels.attention.op import gated_attention, linear_attention

__all__ = ["OPS", "GatedAttention", "LinearAttention", "gated_attention", "linear_attention"]
