"""Attention over all tokens: softmax with a gate, and without softmax."""

from degmix_kernels.attention.cases import OPS
from degmix_kernels.attention.linear_op import linear_attention
from degmix_kernels.attention.module import GatedAttention, LinearAttention
from degmix_kernels.attention.op import gated_attention

__all__ = ["OPS", "GatedAttention", "LinearAttention", "gated_attention", "linear_attention"]
