"""The attention call: q, k and v of this rank's tokens in, their output out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dist_attn.attention import compiled
from dist_attn.attention.context import AttentionContext, KeptAttention
from dist_attn.attention.dispatch import Place, choose_strategy, make_call
from dist_attn.attention.strategy import Call, Strategy, forward_once
from dist_attn.comm.ledger import Ledger
from dist_attn.errors import PlanError
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask


def attention(  # noqa: PLR0913
    q_LHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    *,
    mask: Mask,
    layout: Layout,
    group: CommGroup,
    strategy: str,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    gradient_dtype: torch.dtype | None = None,
    ledger: Ledger | None = None,
    kept: KeptAttention | None = None,
) -> Any:
    """Softmax attention over a stream that the ranks of a group hold together.

    Args:
        q_LHD: queries of this rank's tokens, in stream order. With a batch in front, [B, L, H, D],
            each of the B streams has the same mask and layout.
        k_LKD: keys; the number of query heads is a multiple of theirs.
        v_LKD: values.
        mask: what may attend to what, in stream positions.
        layout: which rank holds which tokens; local lengths may differ and may be 0.
        group: the ranks.
        strategy: `local`, `ring`, `gather`, `ulysses`, or, for a group with an inner and an outer
            group, two of the last three, `inner+outer`; a group of one is always local.
        softmax_scale: factor of the scores, by default 1 / sqrt(D).
        return_lse: also return the normaliser.
        deterministic: bitwise the same result every time, at some cost on a GPU.
        gradient_dtype: in what gradients of keys and values travel. By default those of one rank's
            queries travel as its kernel returns them, and sums over ranks in float32 (float64 for
            float64 inputs). A 16-bit type halves that traffic and rounds at every hop.
        ledger: counts calls and bytes sent.
        kept: where a layer that is computed twice (checkpointing) keeps its first result, so that
            the second call neither computes nor communicates; not with a batch.

    Returns:
        out like q; with `return_lse` also lse [H, L], the natural logarithm of the softmax's
        denominator, float32 (float64 for float64 inputs), which carries no gradient. A query
        without keys has out 0 and lse -inf.

    Raises:
        PlanError: tensors, layout and group do not fit, or nothing can compute this combination.

    Collective:
        Every rank of the group, in the forward and again in the backward. ring: at most
        cp_size - 1 exchanges of keys and values; backward also of their gradients.
        gather: as ring, of the keys and values that are seen, directly from who holds them.
        ulysses: two all-to-alls; backward two, or three if key/value heads are replicated.

    Numerics:
        Parts are merged, and gradients added up, in float32.
    """
    chosen = choose_strategy(strategy, group)
    place = Place(mask, layout, group, deterministic, gradient_dtype, ledger, kept)
    if q_LHD.ndim == 4:
        assert kept is None, "one result is kept, of one stream"
        if not len(q_LHD) == len(k_LKD) == len(v_LKD) > 0:
            raise PlanError(
                f"q, k and v need the same batch of one stream at least, got {len(q_LHD)}, "
                f"{len(k_LKD)} and {len(v_LKD)}"
            )
        streams = list(zip(q_LHD, k_LKD, v_LKD, strict=True))
    else:
        streams = [(q_LHD, k_LKD, v_LKD)]
    results = []
    for q, k, v in streams:
        call = make_call(q, k, v, place, softmax_scale)
        results.append(_Attention.apply(q, k, v, call, chosen, return_lse))
    outs, lses = zip(*results, strict=True)
    if q_LHD.ndim == 4:
        out, lse = torch.stack(outs), torch.stack(lses) if return_lse else None
    else:
        out, lse = outs[0], lses[0]
    return (out, lse) if return_lse else out


def attend_with_context(
    q_LHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    context: AttentionContext,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of one layer in the context of a micro-batch.

    The last `context.num_padding` tokens belong to no document: their output is 0 and their
    gradients are 0, so that a rank whose tokens are all padding still runs forward and backward.

    Under torch.compile it stays in the graph as one operator; the context must then live until the
    backward is done.
    """
    if context.parts:
        return _attend_in_parts(q_LHD, k_LKD, v_LKD, context, softmax_scale)
    if torch.compiler.is_compiling():
        return compiled.attend(q_LHD, k_LKD, v_LKD, context.number, softmax_scale)[0]
    num_tokens = q_LHD.shape[0] - context.num_padding
    out = attention(
        q_LHD[:num_tokens],
        k_LKD[:num_tokens],
        v_LKD[:num_tokens],
        mask=context.mask,
        layout=context.layout,
        group=context.group,
        strategy=context.strategy,
        softmax_scale=softmax_scale,
        deterministic=context.deterministic,
        gradient_dtype=context.gradient_dtype,
        ledger=context.ledger,
        kept=context.kept,
    )
    return F.pad(out, (0, 0, 0, 0, 0, context.num_padding)) if context.num_padding else out


def _attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, softmax_scale: float | None
) -> Tensor:
    """One call per group, in an order that all ranks share; autograd goes back in the opposite."""
    outs, begin = [], 0
    for part in context.parts:
        own = slice(begin, begin + part.num_tokens)
        outs.append(attend_with_context(q[own], k[own], v[own], part, softmax_scale))
        begin = own.stop
    out = torch.cat(outs)
    return F.pad(out, (0, 0, 0, 0, 0, context.num_padding)) if context.num_padding else out


class _Attention(torch.autograd.Function):
    """A strategy's forward and backward as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, strategy: Strategy, with_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        out, lse, residuals = forward_once(strategy, call, q, k, v, with_lse)
        ctx.save_for_backward(*residuals)
        ctx.call, ctx.strategy = call, strategy
        if not with_lse:
            return out, None
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.strategy.backward(ctx.call, ctx.saved_tensors, dout.contiguous())
        return dq, dk, dv, None, None, None
