"""Softmax attention over at most eight tasks at each pixel."""

from degmix_kernels.task_attention.cases import OPS
from degmix_kernels.task_attention.module import TaskAttention
from degmix_kernels.task_attention.op import task_attention

__all__ = ["OPS", "TaskAttention", "task_attention"]
