"""Ulysses: an all-to-all gives each rank the whole stream for some of the heads, and back.

Query heads are dealt out as evenly as they can be. Of the key/value heads a rank gets those that
its query heads read; one that several ranks read goes to each of them, and no farther.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from dist_attn_kernels.dense import Saved
from torch import Tensor

from dist_attn.attention.accumulate import RowSum, SoftmaxSum, accumulation_dtype
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import Call, Residuals
from dist_attn.comm.all_to_all import all_to_all


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank computes.

    Attributes:
        q: per rank the half-open interval of its query heads, possibly empty.
        kv: per rank the half-open interval of the key/value heads that these read.
        repeats: query heads per key/value head.
    """

    q: tuple[tuple[int, int], ...]
    kv: tuple[tuple[int, int], ...]
    repeats: int

    @property
    def replicated(self) -> bool:
        """Whether some key/value head goes to several ranks."""
        return any(a[1] > b[0] for a, b in itertools.pairwise(self.kv))

    def uniform(self, cp_rank: int) -> bool:
        """Whether each of a rank's key/value heads is read by equally many of its query heads."""
        read = self.kv_head_of_q(cp_rank)
        counts = {read.count(h) for h in read}
        return len(counts) <= 1

    def kv_head_of_q(self, cp_rank: int) -> list[int]:
        """For each of a rank's query heads, which of the rank's key/value heads it reads."""
        first = self.kv[cp_rank][0]
        return [h // self.repeats - first for h in range(*self.q[cp_rank])]


def split_heads(num_heads: int, num_kv_heads: int, cp_size: int) -> HeadSplit:
    """Deal the query heads out to `cp_size` ranks, one more to some if they do not divide."""
    repeats = num_heads // num_kv_heads
    bounds = [num_heads * r // cp_size for r in range(cp_size + 1)]
    q = tuple(itertools.pairwise(bounds))
    kv = tuple((a // repeats, -(-b // repeats) if b > a else a // repeats) for a, b in q)
    return HeadSplit(q, kv, repeats)


class Ulysses:
    """See the module."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        split = split_heads(q.shape[1], k.shape[1], call.group.cp_size)
        trade = _Trade(call, split)
        q_heads, k_heads, v_heads = trade.to_heads([q, k, v], [split.q, split.kv, split.kv])
        read = _expand(split, call.group.cp_rank, q.device)
        total = SoftmaxSum(q_heads, v.shape[-1])
        if q_heads.numel():
            k_read, v_read = _read(k_heads, read), _read(v_heads, read)
            first = split.q[call.group.cp_rank][0]
            call.work.stream.forward(call.kernel, q_heads, k_read, v_read, total, first)
        out_heads, lse_heads = total.result()
        (out,) = trade.to_tokens([out_heads], [split.q])
        lse = None
        if with_lse:
            (lse_LH,) = trade.to_tokens([lse_heads.t()[..., None]], [split.q])
            lse = torch.cat(lse_LH, dim=1)[..., 0].t().contiguous()
        return torch.cat(out, dim=1), lse, (q_heads, k_heads, v_heads, out_heads, lse_heads)

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        q, k, v, out, lse = residuals
        # The number of heads of the call is not that of the residuals, which hold a rank's share.
        split = split_heads(dout.shape[1], call.num_kv_heads, call.group.cp_size)
        trade = _Trade(call, split)
        (dout_heads,) = trade.to_heads([dout], [split.q])
        read = _expand(split, call.group.cp_rank, q.device)
        k_read, v_read = _read(k, read), _read(v, read)
        total = Gradients(RowSum(q), RowSum(k_read), RowSum(v_read))
        if q.numel():
            saved = Saved(dout_heads, q, k_read, v_read, out, lse)
            first = split.q[call.group.cp_rank][0]
            call.work.stream.backward(call.kernel, saved, total, first)
        dq_heads = total.dq.result()
        wide = accumulation_dtype(k.dtype) if split.replicated else k.dtype
        dkv_heads = [_fold(s, read, k.shape[1]).to(wide) for s in (total.dk, total.dv)]
        if wide == q.dtype:
            dq, *dkv = trade.to_tokens([dq_heads, *dkv_heads], [split.q, split.kv, split.kv])
        else:
            (dq,) = trade.to_tokens([dq_heads], [split.q])
            dkv = trade.to_tokens(dkv_heads, [split.kv, split.kv])
        dk, dv = (_add_heads(parts, split, call.num_kv_heads).to(k.dtype) for parts in dkv)
        return torch.cat(dq, dim=1), dk, dv


class _Trade:
    """All-to-all between tokens with all heads and heads with all tokens."""

    def __init__(self, call: Call, split: HeadSplit) -> None:
        self.call = call
        self.split = split

    def to_heads(
        self, tensors: list[Tensor], heads: list[tuple[tuple[int, int], ...]]
    ) -> list[Tensor]:
        """Return for each tensor [L, heads, D] the whole stream of this rank's heads."""
        group, layout = self.call.group, self.call.work.layout
        outgoing = [
            [x[:, slice(*h[r])] for x, h in zip(tensors, heads, strict=True)]
            for r in range(group.cp_size)
        ]
        counts = [h[group.cp_rank][1] - h[group.cp_rank][0] for h in heads]
        incoming = [
            [(length, n, x.shape[2]) for x, n in zip(tensors, counts, strict=True)]
            for length in layout.local_seq_lens
        ]
        received = all_to_all(outgoing, incoming, group, ledger=self.call.ledger)
        order = self.call.work.stream_order(tensors[0].device)
        streams = [torch.cat([parts[i] for parts in received]) for i in range(len(tensors))]
        return streams if order is None else [x.index_select(0, order) for x in streams]

    def to_tokens(
        self, tensors: list[Tensor], heads: list[tuple[tuple[int, int], ...]]
    ) -> list[list[Tensor]]:
        """Return for each tensor [S, own heads, D] this rank's tokens, per rank's heads."""
        group, layout = self.call.group, self.call.work.layout
        order = self.call.work.rank_order(tensors[0].device)
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        pieces = [x.split(list(layout.local_seq_lens)) for x in tensors]
        outgoing = [[p[r] for p in pieces] for r in range(group.cp_size)]
        length = layout.local_seq_len(group.cp_rank)
        incoming = [
            [(length, h[s][1] - h[s][0], x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
            for s in range(group.cp_size)
        ]
        received = all_to_all(outgoing, incoming, group, ledger=self.call.ledger)
        return [[parts[i] for parts in received] for i in range(len(tensors))]


def _expand(split: HeadSplit, cp_rank: int, device: torch.device) -> Tensor | None:
    """Index that gives every query head its own key/value head, where groups are uneven."""
    if split.uniform(cp_rank):
        return None
    return torch.tensor(split.kv_head_of_q(cp_rank), device=device)


def _read(x: Tensor, read: Tensor | None) -> Tensor:
    return x if read is None else x.index_select(1, read)


def _fold(total: RowSum, read: Tensor | None, num_kv_heads: int) -> Tensor:
    """Sum the gradients of key/value heads that were given to several query heads."""
    if read is None:
        return total.result()
    wide = total.wide()
    folded = wide.new_zeros(wide.shape[0], num_kv_heads, wide.shape[2])
    return folded.index_add_(1, read, wide)


def _add_heads(parts: list[Tensor], split: HeadSplit, num_kv_heads: int) -> Tensor:
    """Sum the ranks' gradients of the key/value heads that each of them read."""
    total = parts[0].new_zeros(parts[0].shape[0], num_kv_heads, parts[0].shape[2])
    for part, (first, end) in zip(parts, split.kv, strict=True):
        total[:, first:end] += part
    return total
