"""One attention call carried out by the ranks of a group."""

from dist_attn.attention.api import attend_with_context, attention
from dist_attn.attention.context import AttentionContext
from dist_attn.attention.dispatch import explain_kernel

__all__ = ["AttentionContext", "attend_with_context", "attention", "explain_kernel"]
