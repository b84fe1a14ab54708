"""Attention as a custom operator, so that torch.compile keeps it in the graph.

The operator finds its context by number. Sizes of what Ulysses keeps for the backward are known
only when it runs: to the compiler they are any sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_attn.attention.accumulate import accumulation_dtype
from dist_attn.attention.context import context_of
from dist_attn.attention.dispatch import Place, choose_strategy, make_call
from dist_attn.attention.strategy import NUM_KEPT, Call, Residuals, Strategy

#: Tensors that an operator returns for its backward: Ulysses keeps those of each chunk of heads.
MAX_KEPT = 4 * NUM_KEPT


@torch.library.custom_op("dist_attn::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, context: int, softmax_scale: float | None
) -> list[Tensor]:
    """Return out, lse, and what the strategy keeps, flat; nothing for what the caller has."""
    strategy, call, (q, k, v), num_padding = _resolve([q, k, v], context, softmax_scale)
    out, lse, kept = strategy.forward(call, q, k, v, strategy.keeps_own)
    if lse is None or not strategy.keeps_own:
        lse = out.new_zeros((out.shape[1], len(out)), dtype=accumulation_dtype(q.dtype))
        flat = [x.reshape(-1) for x in kept]
    else:
        flat = []
    flat += [_nothing(q, i) for i in range(len(flat), MAX_KEPT)]
    padded = torch.nn.functional.pad
    out, lse = padded(out, (0, 0, 0, 0, 0, num_padding)), padded(lse, (0, num_padding))
    return [out.contiguous(), lse.contiguous(), *flat]


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, context: int, softmax_scale: float | None) -> list[Tensor]:
    library = torch.library.get_ctx()
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))
    sizes = [library.new_dynamic_size() for _ in range(MAX_KEPT)]
    kept = [q.new_empty(size, dtype=_kept_dtype(q, i)) for i, size in enumerate(sizes)]
    return [torch.empty_like(q, memory_format=torch.contiguous_format), lse, *kept]


@torch.library.custom_op("dist_attn::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    inputs: list[Tensor],
    outputs: list[Tensor],
    context: int,
    softmax_scale: float | None,
) -> list[Tensor]:
    """Return the gradients of q, k and v; `inputs` and `outputs` are those of the forward."""
    strategy, call, tensors, num_padding = _resolve(inputs, context, softmax_scale)
    out, lse, *flat = outputs
    num_tokens = len(out) - num_padding
    kept: Residuals = (*tensors, out[:num_tokens], lse[:, :num_tokens].contiguous())
    if not strategy.keeps_own:
        kept = strategy.unflatten(call, tuple(flat), out.shape[2])
    grads = strategy.backward(call, kept, dout[:num_tokens].contiguous())
    pad = (0, 0, 0, 0, 0, num_padding)
    return [torch.nn.functional.pad(g, pad).contiguous() for g in grads]


@attend_backward.register_fake
def _(
    dout: Tensor,
    inputs: list[Tensor],
    outputs: list[Tensor],
    context: int,
    softmax_scale: float | None,
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, ctx.context, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    inputs, outputs = list(ctx.saved_tensors[:3]), list(ctx.saved_tensors[3:])
    dq, dk, dv = attend_backward(grads[0], inputs, outputs, ctx.context, ctx.softmax_scale)
    return dq, dk, dv, None, None


attend.register_autograd(_backward, setup_context=_setup)


def _resolve(
    tensors: list[Tensor], number: int, softmax_scale: float | None
) -> tuple[Strategy, Call, list[Tensor], int]:
    context = context_of(number)
    num_tokens = len(tensors[0]) - context.num_padding
    q, k, v = (x[:num_tokens] for x in tensors)
    place = Place(
        context.mask,
        context.layout,
        context.group,
        context.deterministic,
        context.gradient_dtype,
        context.ledger,
    )
    call = make_call(q, k, v, place, softmax_scale)
    return choose_strategy(context.strategy, context.group), call, [q, k, v], context.num_padding


def _kept_dtype(q: Tensor, i: int) -> torch.dtype:
    return accumulation_dtype(q.dtype) if i % NUM_KEPT == NUM_KEPT - 1 else q.dtype


def _nothing(q: Tensor, i: int) -> Tensor:
    return q.new_empty(0, dtype=_kept_dtype(q, i))
