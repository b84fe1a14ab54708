"""Ulysses: an all-to-all gives each rank all tokens of its node for some of the heads, and back.

A node is the whole group, or in a hybrid a part of it; then another strategy works across nodes.

Query heads are dealt out as evenly as they can be. Of the key/value heads a rank gets those that
its query heads read; one that several ranks read goes to each of them, and no farther.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_attn.attention.accumulate import accumulation_dtype, index_of
from dist_attn.attention.strategy import Call, Residuals, Strategy
from dist_attn.attention.workload import workload
from dist_attn.comm.all_to_all import all_to_all
from dist_attn.groups import single_rank_group


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
    """See the module.

    Args:
        across: what computes a node's share of the heads. A node is the group's inner group, and
            `across` works between the ranks of the outer one; without these the group is one node
            and `across` is local.
    """

    keeps_own = False

    def __init__(self, across: Strategy) -> None:
        self._across = across

    def unflatten(self, call: Call, flat: Residuals, head_dim: int) -> Residuals:
        """See `Strategy`."""
        work = _Trade(call).across.work
        if not work.heads:
            return ()
        q, k, v, out, lse = flat
        of_q, of_kv = (-1, len(work.heads), head_dim), (-1, work.num_kv_heads, head_dim)
        return q.view(of_q), k.view(of_kv), v.view(of_kv), out.view(of_q), lse.view(of_q[1], -1)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        trade = _Trade(call)
        split = trade.split
        q_heads, k_heads, v_heads = trade.to_heads([q, k, v], [split.q, split.kv, split.kv])
        kept: Residuals = ()
        out_heads, lse_heads = q_heads, q_heads.new_empty((0, len(q_heads)))
        if q_heads.shape[1]:
            read = _expand(split, trade.node.cp_rank, q.device)
            tensors = q_heads, _read(k_heads, read), _read(v_heads, read)
            out_heads, found, kept = self._across.forward(trade.across, *tensors, with_lse)
            lse_heads = lse_heads if found is None else found
        (out,) = trade.to_tokens([out_heads], [split.q])
        if not with_lse:
            return torch.cat(out, dim=1), None, kept
        (lse_LH,) = trade.to_tokens([lse_heads.t()[..., None]], [split.q])
        lse = torch.cat(lse_LH, dim=1)[..., 0].t().contiguous()
        return torch.cat(out, dim=1), lse, kept

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        trade = _Trade(call)
        split = trade.split
        (dout_heads,) = trade.to_heads([dout], [split.q])
        dim = dout.shape[2]
        first_kv, end_kv = split.kv[trade.node.cp_rank]
        dq_heads = dout_heads
        # Of heads that several ranks read the gradients are yet to be added up.
        wide = call.travel_dtype(dout.dtype, summed=True) if split.replicated else dout.dtype
        dkv_heads = [dout.new_zeros((len(dout_heads), end_kv - first_kv, dim), dtype=wide)] * 2
        if dout_heads.shape[1]:
            dq_heads, *grads = self._across.backward(trade.across, residuals, dout_heads)
            read = _expand(split, trade.node.cp_rank, dout.device)
            dkv_heads = [_fold(g, read, end_kv - first_kv).to(wide) for g in grads]
        if wide == dout.dtype:
            dq, *dkv = trade.to_tokens([dq_heads, *dkv_heads], [split.q, split.kv, split.kv])
        else:
            (dq,) = trade.to_tokens([dq_heads], [split.q])
            dkv = trade.to_tokens(dkv_heads, [split.kv, split.kv])
        num_kv_heads = call.work.num_kv_heads
        dk, dv = (_add_heads(parts, split, num_kv_heads).to(dout.dtype) for parts in dkv)
        return torch.cat(dq, dim=1), dk, dv


class _Trade:
    """All-to-all inside a node, between tokens with all heads and heads with all tokens."""

    def __init__(self, call: Call) -> None:
        group, work = call.group, call.work
        self.call = call
        self.node = group.inner or group
        self.split = split_heads(len(work.heads), work.num_kv_heads, self.node.cp_size)
        first = group.cp_rank - self.node.cp_rank
        #: Tokens of each rank of the node.
        self.lengths = work.layout.local_seq_lens[first : first + self.node.cp_size]

    @property
    def across(self) -> Call:
        """The call between nodes, of this rank's heads."""
        work, rank, size = self.call.work, self.node.cp_rank, self.node.cp_size
        heads = tuple(work.heads[slice(*self.split.q[rank])])
        uniform = self.split.uniform(rank)
        num_kv_heads = self.split.kv[rank][1] - self.split.kv[rank][0] if uniform else len(heads)
        outer = self.call.group.outer or single_rank_group(self.call.group.cp_rank)
        share = workload(work.mask, work.node_layout(size), outer.cp_rank, heads, num_kv_heads)
        return replace(self.call, work=share, group=outer)

    def to_heads(
        self, tensors: list[Tensor], heads: list[tuple[tuple[int, int], ...]]
    ) -> list[Tensor]:
        """Return for each tensor [L, heads, D] the node's tokens of this rank's heads."""
        node = self.node
        outgoing = [
            [x[:, slice(*h[r])] for x, h in zip(tensors, heads, strict=True)]
            for r in range(node.cp_size)
        ]
        counts = [h[node.cp_rank][1] - h[node.cp_rank][0] for h in heads]
        incoming = [
            [(length, n, x.shape[2]) for x, n in zip(tensors, counts, strict=True)]
            for length in self.lengths
        ]
        received = all_to_all(outgoing, incoming, node, ledger=self.call.ledger)
        order, _ = self.call.work.orders(node.cp_size, tensors[0].device)
        streams = [torch.cat([parts[i] for parts in received]) for i in range(len(tensors))]
        return streams if order is None else [x.index_select(0, order) for x in streams]

    def to_tokens(
        self, tensors: list[Tensor], heads: list[tuple[tuple[int, int], ...]]
    ) -> list[list[Tensor]]:
        """Return for each tensor [S, own heads, D] this rank's tokens, per rank's heads."""
        node = self.node
        _, order = self.call.work.orders(node.cp_size, tensors[0].device)
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        pieces = [x.split(list(self.lengths)) for x in tensors]
        outgoing = [[p[r] for p in pieces] for r in range(node.cp_size)]
        length = self.lengths[node.cp_rank]
        incoming = [
            [(length, h[s][1] - h[s][0], x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
            for s in range(node.cp_size)
        ]
        received = all_to_all(outgoing, incoming, node, ledger=self.call.ledger)
        return [[parts[i] for parts in received] for i in range(len(tensors))]


def _expand(split: HeadSplit, cp_rank: int, device: torch.device) -> Tensor | None:
    """Index that gives every query head its own key/value head, where groups are uneven."""
    if split.uniform(cp_rank):
        return None
    return index_of(tuple(split.kv_head_of_q(cp_rank)), device)


def _read(x: Tensor, read: Tensor | None) -> Tensor:
    return x if read is None else x.index_select(1, read)


def _fold(gradient: Tensor, read: Tensor | None, num_kv_heads: int) -> Tensor:
    """Sum the gradients of key/value heads that were given to several query heads."""
    if read is None:
        return gradient
    wide = gradient.to(accumulation_dtype(gradient.dtype))
    folded = wide.new_zeros(wide.shape[0], num_kv_heads, wide.shape[2])
    return folded.index_add_(1, read, wide)


def _add_heads(parts: list[Tensor], split: HeadSplit, num_kv_heads: int) -> Tensor:
    """Sum the ranks' gradients of the key/value heads that each of them read."""
    shape = (parts[0].shape[0], num_kv_heads, parts[0].shape[2])
    total = parts[0].new_zeros(shape, dtype=accumulation_dtype(parts[0].dtype))
    for part, (first, end) in zip(parts, split.kv, strict=True):
        total[:, first:end] += part
    return total
