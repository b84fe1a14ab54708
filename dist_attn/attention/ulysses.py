"""Ulysses: an all-to-all gives each rank all tokens of its node for some of the heads, and back.

A node is the whole group, or in a hybrid a part of it; then another strategy works across nodes.

Query heads are dealt out as evenly as they can be. Of the key/value heads a rank gets those that
its query heads read; one that several ranks read goes to each of them, and no farther.

On a GPU heads are traded in chunks, on a stream of their own: the next chunk comes and the last
one's output leaves while one is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dist_attn.attention.accumulate import accumulation_dtype, index_of
from dist_attn.attention.strategy import NUM_KEPT, Call, Residuals, Strategy
from dist_attn.attention.workload import workload
from dist_attn.comm.all_to_all import all_to_all, joined
from dist_attn.comm.copied_all_to_all import copied_all_to_all
from dist_attn.comm.side_stream import SideStream
from dist_attn.groups import single_rank_group
from dist_attn.peer_memory import ALIGNMENT

#: Per rank a half-open interval.
Intervals = tuple[tuple[int, int], ...]
Traded = list[tuple[Tensor, Intervals]]


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

    @property
    def divisible(self) -> int:
        """Into how many chunks every rank's heads can be cut; 1 where ranks share heads."""
        whole = all(
            (a * self.repeats, b * self.repeats) == q
            for q, (a, b) in zip(self.q, self.kv, strict=True)
        )
        return max(1, min(b - a for a, b in self.kv)) if whole else 1

    def chunk(self, index: int, num_chunks: int) -> HeadSplit:
        """Return one of `num_chunks` parts of every rank's heads."""
        if num_chunks == 1:
            return self
        kv = tuple(
            (a + (b - a) * index // num_chunks, a + (b - a) * (index + 1) // num_chunks)
            for a, b in self.kv
        )
        q = tuple((a * self.repeats, b * self.repeats) for a, b in kv)
        return HeadSplit(q, kv, self.repeats)

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
        max_chunks: on a GPU the heads are traded in so many chunks at the most, each while the one
            before is computed.
    """

    keeps_own = False

    def __init__(self, across: Strategy, max_chunks: int = 4) -> None:
        self._across = across
        self._max_chunks = max_chunks

    def unflatten(self, call: Call, flat: Residuals, head_dim: int) -> Residuals:
        """See `Strategy`."""
        kept: list[Tensor] = []
        for i, trade in enumerate(self._trades(call, flat[0].device)):
            work = trade.across.work
            if not work.heads:
                continue
            q, k, v, out, lse = flat[NUM_KEPT * i : NUM_KEPT * (i + 1)]
            of_q, of_kv = (-1, len(work.heads), head_dim), (-1, work.num_kv_heads, head_dim)
            kept += [q.view(of_q), k.view(of_kv), v.view(of_kv), out.view(of_q)]
            kept.append(lse.view(of_q[1], -1))
        return tuple(kept)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        trades = self._trades(call, q.device)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[1], len(q), dtype=accumulation_dtype(q.dtype))
        side = SideStream(q.device)
        coming = side.run_at_once(partial(trades[0].qkv_to_heads, q, k, v))
        kept: list[Tensor] = []
        for i, trade in enumerate(trades):
            q_heads, k_heads, v_heads = coming.result()
            if i + 1 < len(trades):
                coming = side.run_at_once(partial(trades[i + 1].qkv_to_heads, q, k, v))
            out_heads, lse_heads = q_heads, lse.new_empty((0, len(q_heads)))
            if q_heads.shape[1]:
                read = _expand(trade.split, trade.node.cp_rank, q.device)
                tensors = q_heads, _read(k_heads, read), _read(v_heads, read)
                found = self._across.forward(trade.across, *tensors, with_lse)
                out_heads, lse_heads = found[0], lse_heads if found[1] is None else found[1]
                kept += found[2]
            side.run(partial(trade.put_tokens, out_heads, out))
            if with_lse:
                of_tokens = (x.t()[..., None] for x in (lse_heads, lse))
                side.run(partial(trade.put_tokens, *of_tokens))
        side.finish()
        return out, lse if with_lse else None, tuple(kept)

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        trades = self._trades(call, dout.device)
        num_kv_heads = call.work.num_kv_heads
        dq = torch.empty_like(dout)
        # Gradients of heads that several ranks read are added up.
        summed = trades[0].split.replicated
        wide = accumulation_dtype(dout.dtype) if summed else dout.dtype
        shape = (len(dout), num_kv_heads, dout.shape[2])
        make = dout.new_zeros if summed else dout.new_empty
        dkv = [make(shape, dtype=wide) for _ in range(2)]
        side = SideStream(dout.device)
        coming = side.run_at_once(partial(trades[0].dout_to_heads, dout))
        kept = list(residuals)
        for i, trade in enumerate(trades):
            dout_heads = coming.result()
            if i + 1 < len(trades):
                coming = side.run_at_once(partial(trades[i + 1].dout_to_heads, dout))
            first_kv, end_kv = trade.split.kv[trade.node.cp_rank]
            dq_heads = dout_heads
            none = (len(dout_heads), end_kv - first_kv, dout.shape[2])
            dkv_heads = [dout.new_zeros(none)] * 2
            if dout_heads.shape[1]:
                saved, kept = tuple(kept[:NUM_KEPT]), kept[NUM_KEPT:]
                dq_heads, *grads = self._across.backward(trade.across, saved, dout_heads)
                read = _expand(trade.split, trade.node.cp_rank, dout.device)
                dkv_heads = [_fold(g, read, end_kv - first_kv) for g in grads]
            travel = call.travel_dtype(dout.dtype, summed=True) if summed else dout.dtype
            dkv_heads = [g.to(travel) for g in dkv_heads]
            side.run(partial(trade.put_tokens, dq_heads, dq))
            side.run(partial(trade.add_tokens, dkv_heads, dkv))
        side.finish()
        dk, dv = (x.to(dout.dtype) for x in dkv)
        return dq, dk, dv

    def _trades(self, call: Call, device: torch.device) -> list[_Trade]:
        node = call.group.inner or call.group
        split = split_heads(len(call.work.heads), call.work.num_kv_heads, node.cp_size)
        chunks = self.num_chunks(split, device)
        return [_Trade(call, split.chunk(i, chunks), i == 0) for i in range(chunks)]

    def num_chunks(self, split: HeadSplit, device: torch.device) -> int:
        """In how many chunks the heads are traded."""
        return min(self._max_chunks, split.divisible) if device.type == "cuda" else 1


class _Trade:
    """All-to-all inside a node, between tokens with all heads and heads with all tokens."""

    def __init__(self, call: Call, split: HeadSplit, is_first: bool) -> None:
        group, work = call.group, call.work
        self.call = call
        self.node = group.inner or group
        self.split = split
        first = group.cp_rank - self.node.cp_rank
        #: Tokens of each rank of the node.
        self.lengths = work.layout.local_seq_lens[first : first + self.node.cp_size]
        #: Whether GPUs copy to each other; heads that several ranks read are added up instead.
        self.copies = self.node.peers is not None and not split.replicated
        #: Whether nothing is computed while tensors come.
        self.is_first = is_first

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

    def qkv_to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Return the node's tokens of this rank's heads."""
        return self._to_heads([q, k, v], [self.split.q, self.split.kv, self.split.kv])

    def dout_to_heads(self, dout: Tensor) -> Tensor:
        """Return the node's tokens of this rank's query heads."""
        return self._to_heads([dout], [self.split.q])[0]

    def put_tokens(self, x: Tensor, target: Tensor) -> None:
        """Put this rank's tokens of [S, own query heads, D] into [L, H, D]."""
        if self.copies:
            self._copy_tokens([x], [target], [self.split.q])
            return
        (parts,) = self._to_tokens([x], [self.split.q])
        for part, heads in zip(parts, self.split.q, strict=True):
            target[:, slice(*heads)] = part

    def add_tokens(self, pair: list[Tensor], targets: list[Tensor]) -> None:
        """Put, or add where several ranks read a head, [S, own heads, D] into [L, K, D]."""
        if self.copies:
            self._copy_tokens(pair, targets, [self.split.kv] * 2)
            return
        received = self._to_tokens(pair, [self.split.kv] * 2)
        for parts, target in zip(received, targets, strict=True):
            for part, heads in zip(parts, self.split.kv, strict=True):
                if self.split.replicated:
                    target[:, slice(*heads)] += part
                else:
                    target[:, slice(*heads)] = part

    def _to_heads(self, tensors: list[Tensor], heads: list[Intervals]) -> list[Tensor]:
        node = self.node
        order, _ = self.call.work.orders(node.cp_size, tensors[0].device)
        streams = self._copy_heads(tensors, heads) if self.copies else []
        for group in [] if self.copies else _messages(list(zip(tensors, heads, strict=True))):
            outgoing = [[x[:, slice(*h[r])] for x, h in group] for r in range(node.cp_size)]
            counts = [h[node.cp_rank][1] - h[node.cp_rank][0] for _, h in group]
            incoming = [
                [(length, n, x.shape[2]) for (x, _), n in zip(group, counts, strict=True)]
                for length in self.lengths
            ]
            received = all_to_all(outgoing, incoming, node, ledger=self.call.ledger)
            streams += [joined([parts[i] for parts in received]) for i in range(len(group))]
        return streams if order is None else [x.index_select(0, order) for x in streams]

    def _copy_heads(self, tensors: list[Tensor], heads: list[Intervals]) -> list[Tensor]:
        """Return the node's tokens of this rank's heads, rank after rank."""
        node = self.node
        streams = [
            x.new_empty(sum(self.lengths), h[node.cp_rank][1] - h[node.cp_rank][0], x.shape[2])
            for x, h in zip(tensors, heads, strict=True)
        ]
        outgoing = [
            [x[:, slice(*h[r])] for x, h in zip(tensors, heads, strict=True)]
            for r in range(node.cp_size)
        ]
        targets = list(zip(*(s.split(list(self.lengths)) for s in streams), strict=True))
        self._copy(outgoing, targets, pack=self.is_first)
        return streams

    def _copy_tokens(
        self, tensors: list[Tensor], targets: list[Tensor], heads: list[Intervals]
    ) -> None:
        """Put this rank's tokens of each [S, own heads, D] into [L, all heads, D]."""
        _, order = self.call.work.orders(self.node.cp_size, tensors[0].device)
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        outgoing = list(zip(*(x.split(list(self.lengths)) for x in tensors), strict=True))
        wanted = [
            [x[:, slice(*h[r])] for x, h in zip(targets, heads, strict=True)]
            for r in range(self.node.cp_size)
        ]
        self._copy(outgoing, wanted, pack=False)

    def _copy(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        targets: Sequence[Sequence[Tensor]],
        *,
        pack: bool,
    ) -> None:
        x, both = outgoing[0][0], (self.split.q, self.split.kv)
        heads = [b - a + 2 * (d - c) for (a, b), (c, d) in zip(*both, strict=True)]
        # As much as queries, keys and values, or their gradients, in the widest type.
        most = max(self.lengths) * max(heads) * x.shape[2] * max(x.element_size(), 4)
        copied_all_to_all(
            outgoing, targets, self.node, most + 3 * ALIGNMENT, ledger=self.call.ledger, pack=pack
        )

    def _to_tokens(self, tensors: list[Tensor], heads: list[Intervals]) -> list[list[Tensor]]:
        """Return for each tensor [S, own heads, D] this rank's tokens, per rank's heads."""
        node = self.node
        _, order = self.call.work.orders(node.cp_size, tensors[0].device)
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        length = self.lengths[node.cp_rank]
        lists: list[list[Tensor]] = []
        for group in _messages(list(zip(tensors, heads, strict=True))):
            pieces = [x.split(list(self.lengths)) for x, _ in group]
            outgoing = [[p[r] for p in pieces] for r in range(node.cp_size)]
            incoming = [
                [(length, h[s][1] - h[s][0], x.shape[2]) for x, h in group]
                for s in range(node.cp_size)
            ]
            received = all_to_all(outgoing, incoming, node, ledger=self.call.ledger)
            lists += [[parts[i] for parts in received] for i in range(len(group))]
        return lists


def _messages(traded: Traded) -> list[Traded]:
    """Tensors that are sent together: on a CPU calls are dear, on a GPU packing is."""
    return [[x] for x in traded] if traded[0][0].is_cuda else [traded]


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
