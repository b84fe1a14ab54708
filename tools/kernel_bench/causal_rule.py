"""The causal rule in flash-attn-4's language; importable only where that is installed."""

from __future__ import annotations

from cutlass import cute


@cute.jit
def causal_rule(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """A query sees the keys up to its own."""
    return key <= query
