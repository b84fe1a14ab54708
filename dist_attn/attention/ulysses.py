"""Ulysses: an all-to-all gives each rank all tokens of its node for some of the heads, and back.

A node is the whole group, or in a hybrid a part of it; then another strategy works across nodes.

Query heads are dealt out as evenly as they can be. Of the key/value heads a rank gets those that
its query heads read; one that several ranks read goes to each of them, and no farther.

On a GPU heads are traded in chunks, on a stream of their own: the next chunk comes and the last
one's output leaves while one is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dist_attn.attention.accumulate import accumulation_dtype, index_of
from dist_attn.attention.strategy import Call, Residuals, Strategy, forward_once
from dist_attn.attention.workload import workload
from dist_attn.comm.all_to_all import all_to_all, joined
from dist_attn.comm.copied_all_to_all import copied_all_to_all
from dist_attn.comm.side_stream import SideStream, Ticket
from dist_attn.groups import single_rank_group
from dist_attn.peer_memory import ALIGNMENT

#: Per rank a half-open interval.
Intervals = tuple[tuple[int, int], ...]
#: For each of some tensors, the part of each rank.
Parts = list[list[Tensor]]


#: Scores of one rank for which a chunk is worth its launches: about a millisecond of an H100.
CHUNK_SCORES = 2**30


@dataclass(frozen=True)
class Prepared:
    """What goes to each rank, and, where GPUs copy, the place for what comes, own part included."""

    outgoing: Parts
    streams: list[Tensor]


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
        outside: the other way round, heads are traded in the outer group and `across` works in the
            inner one.
    """

    keeps_own = False

    def __init__(self, across: Strategy, max_chunks: int = 4, *, outside: bool = False) -> None:
        self._across = across
        self._max_chunks = max_chunks
        self._outside = outside

    def num_kept(self, call: Call) -> int:
        """See `Strategy`."""
        assert self._max_chunks == 1, "only heads that are traded at once are traded twice"
        across = _Trade(call, None, self._outside).across
        return self._across.num_kept(across) if across.work.heads else 0

    def unflatten(self, call: Call, flat: Residuals, head_dim: int) -> Residuals:
        """See `Strategy`."""
        kept: list[Tensor] = []
        for trade in self._trades(call, flat[0].device):
            across = trade.across
            if not across.work.heads:
                continue
            mine = flat[len(kept) : len(kept) + self._across.num_kept(across)]
            if not self._across.keeps_own:
                kept += self._across.unflatten(across, mine, head_dim)
                continue
            q, k, v, out, lse = mine
            of_q = (-1, len(across.work.heads), head_dim)
            of_kv = (-1, across.work.num_kv_heads, head_dim)
            kept += [q.view(of_q), k.view(of_kv), v.view(of_kv), out.view(of_q)]
            kept.append(lse.view(of_q[1], -1))
        return tuple(kept)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        trades = self._trades(call, q.device)
        side = SideStream(q.device, call.ledger)
        arriving = _arrivals(trades, side, [q, k, v])
        leaving: list[list[Ticket[Parts]]] = []
        kept: list[Tensor] = []
        for trade, (q_heads, k_heads, v_heads) in zip(trades, arriving, strict=True):
            out_heads = q_heads
            lse_heads = q.new_empty((0, len(q_heads)), dtype=accumulation_dtype(q.dtype))
            if q_heads.shape[1]:
                read = _expand(trade.split, trade.node.cp_rank, q.device)
                tensors = q_heads, _read(k_heads, read), _read(v_heads, read)
                out_heads, found, residuals = forward_once(
                    self._across, trade.across, *tensors, with_lse
                )
                lse_heads = lse_heads if found is None else found
                kept += residuals
            gone = [side.run(partial(trade.to_tokens, [out_heads], [trade.split.q]))]
            if with_lse:
                x = lse_heads.t()[..., None]
                gone.append(side.run(partial(trade.to_tokens, [x], [trade.split.q])))
            leaving.append(gone)
        side.finish()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[1], len(q), dtype=accumulation_dtype(q.dtype))
        for trade, gone in zip(trades, leaving, strict=True):
            for ticket, target in zip(gone, (out, lse.t()[..., None]), strict=False):
                trade.place(ticket.result()[0], trade.split.q, target)
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
        travel = call.travel_dtype(dout.dtype, summed=True) if summed else dout.dtype
        side = SideStream(dout.device, call.ledger)
        arriving = _arrivals(trades, side, [dout])
        leaving: list[Ticket[Parts]] = []
        kept = list(residuals)
        for trade, (dout_heads,) in zip(trades, arriving, strict=True):
            first_kv, end_kv = trade.split.kv[trade.node.cp_rank]
            dq_heads = dout_heads
            none = (len(dout_heads), end_kv - first_kv, dout.shape[2])
            dkv_heads = [dout.new_zeros(none)] * 2
            if dout_heads.shape[1]:
                num_kept = self._across.num_kept(trade.across)
                saved, kept = tuple(kept[:num_kept]), kept[num_kept:]
                dq_heads, *grads = self._across.backward(trade.across, saved, dout_heads)
                read = _expand(trade.split, trade.node.cp_rank, dout.device)
                dkv_heads = [_fold(g, read, end_kv - first_kv) for g in grads]
            dkv_heads = [g.to(travel) for g in dkv_heads]
            if travel == dout.dtype:
                heads = [trade.split.q, trade.split.kv, trade.split.kv]
                work = partial(trade.to_tokens, [dq_heads, *dkv_heads], heads)
                leaving.append(side.run(work))
                continue
            leaving.append(side.run(partial(trade.to_tokens, [dq_heads], [trade.split.q])))
            leaving.append(side.run(partial(trade.to_tokens, dkv_heads, [trade.split.kv] * 2)))
        side.finish()
        parts = [p for ticket in leaving for p in ticket.result()]
        for i, trade in enumerate(trades):
            trade.place(parts[3 * i], trade.split.q, dq)
            for target, received in zip(dkv, parts[3 * i + 1 : 3 * i + 3], strict=True):
                trade.place(received, trade.split.kv, target, add=summed)
        dk, dv = (x.to(dout.dtype) for x in dkv)
        return dq, dk, dv

    def _trades(self, call: Call, device: torch.device) -> list[_Trade]:
        whole = _Trade(call, None, self._outside)
        chunks = self.num_chunks(whole.split, call.work.expected_scores, device)
        if chunks == 1:
            return [whole]
        return [_Trade(call, whole.split.chunk(i, chunks), self._outside) for i in range(chunks)]

    def num_chunks(self, split: HeadSplit, scores: int, device: torch.device) -> int:
        """In how many chunks the heads are traded, for so many scores of all heads and tokens."""
        if device.type != "cuda":
            return 1
        worth = scores // len(split.q) // CHUNK_SCORES
        return max(1, min(self._max_chunks, split.divisible, worth))

    def shares(self, call: Call, device: torch.device) -> list[tuple[Strategy, Call]]:
        """Return what a rank computes of each chunk of heads, and how; a call finds the same."""
        found = [(self._across, trade.across) for trade in self._trades(call, device)]
        return [(strategy, share) for strategy, share in found if share.work.heads]


class _Trade:
    """All-to-all inside a node, between tokens with all heads and heads with all tokens."""

    def __init__(self, call: Call, split: HeadSplit | None, outside: bool) -> None:
        group, work = call.group, call.work
        self.call = call
        self.node, self._across_group = group.inner or group, group.outer
        size = self.node.cp_size
        self._nodes = tuple(
            tuple(range(first, first + size)) for first in range(0, group.cp_size, size)
        )
        if outside:
            assert group.outer is not None, "heads are traded between nodes"
            self.node, self._across_group = group.outer, group.inner
            self._nodes = tuple(tuple(range(i, group.cp_size, size)) for i in range(size))
        self.split = split or split_heads(len(work.heads), work.num_kv_heads, self.node.cp_size)
        #: Ranks of the node, by their places in the group, and their tokens.
        self.members = next(n for n in self._nodes if group.cp_rank in n)
        self.lengths = [work.layout.local_seq_lens[r] for r in self.members]
        #: Whether GPUs copy to each other; heads that several ranks read are added up instead.
        self.copies = self.node.peers is not None and not self.split.replicated

    @property
    def across(self) -> Call:
        """The call between nodes, of this rank's heads."""
        work, rank = self.call.work, self.node.cp_rank
        heads = tuple(work.heads[slice(*self.split.q[rank])])
        uniform = self.split.uniform(rank)
        num_kv_heads = self.split.kv[rank][1] - self.split.kv[rank][0] if uniform else len(heads)
        others = self._across_group or single_rank_group(self.call.group.cp_rank)
        layout = work.node_layout(self._nodes)
        share = workload(work.mask, layout, others.cp_rank, heads, num_kv_heads)
        return replace(self.call, work=share, group=others)

    def prepare(self, tensors: list[Tensor]) -> Prepared:
        """Do the part of `to_heads` that takes multiprocessors: pack what goes to others.

        `tensors` are queries like ones, or queries, keys and values, [L, all heads, D].
        """
        heads = [self.split.q, self.split.kv, self.split.kv][: len(tensors)]
        node = self.node
        outgoing = [
            [x[:, slice(*h[r])] for x, h in zip(tensors, heads, strict=True)]
            for r in range(node.cp_size)
        ]
        if not self.copies:
            return Prepared(outgoing, [])
        streams = [
            x.new_empty(sum(self.lengths), h[node.cp_rank][1] - h[node.cp_rank][0], x.shape[2])
            for x, h in zip(tensors, heads, strict=True)
        ]
        for x, own in zip(streams, outgoing[node.cp_rank], strict=True):
            x.split(self.lengths)[node.cp_rank].copy_(own)
        outgoing = [
            [] if r == node.cp_rank else [x.contiguous() for x in xs]
            for r, xs in enumerate(outgoing)
        ]
        return Prepared(outgoing, streams)

    def to_heads(self, prepared: Prepared) -> list[Tensor]:
        """Return the node's tokens of this rank's heads, in stream order."""
        node, streams = self.node, prepared.streams
        if self.copies:
            pieces = [x.split(self.lengths) for x in streams]
            targets = [[p[r] for p in pieces] for r in range(node.cp_size)]
            self._copy(prepared.outgoing, targets)
        else:
            for which in _together(prepared.outgoing[0]):
                outgoing = [[xs[i] for i in which] for xs in prepared.outgoing]
                own = outgoing[node.cp_rank]
                incoming = [[(n, *x.shape[1:]) for x in own] for n in self.lengths]
                received = all_to_all(outgoing, incoming, node, ledger=self.call.ledger)
                streams += [joined([parts[i] for parts in received]) for i in range(len(which))]
        order, _ = self.call.work.orders(self.members, streams[0].device)
        return streams if order is None else [x.index_select(0, order) for x in streams]

    def to_tokens(self, tensors: list[Tensor], heads: list[Intervals]) -> Parts:
        """Return for each tensor [S, own heads, D] this rank's tokens, per rank's heads."""
        node = self.node
        _, order = self.call.work.orders(self.members, tensors[0].device)
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        length = self.lengths[node.cp_rank]
        shapes = [
            [(length, h[s][1] - h[s][0], x.shape[2]) for x, h in zip(tensors, heads, strict=True)]
            for s in range(node.cp_size)
        ]
        pieces = [x.contiguous().split(self.lengths) for x in tensors]
        outgoing = [[p[r] for p in pieces] for r in range(node.cp_size)]
        if self.copies:
            received = [
                [x.new_empty(shape) for x, shape in zip(tensors, of_rank, strict=True)]
                for of_rank in shapes
            ]
            received[node.cp_rank] = outgoing[node.cp_rank]
            self._copy(outgoing, received)
            return [list(parts) for parts in zip(*received, strict=True)]
        lists: Parts = []
        for which in _together(tensors):
            messages = [[xs[i] for i in which] for xs in outgoing]
            incoming = [[of_rank[i] for i in which] for of_rank in shapes]
            received = all_to_all(messages, incoming, node, ledger=self.call.ledger)
            lists += [[parts[i] for parts in received] for i in range(len(which))]
        return lists

    def place(
        self, parts: list[Tensor], heads: Intervals, target: Tensor, *, add: bool = False
    ) -> None:
        """Put, or add, each rank's heads of this rank's tokens where they belong in all heads."""
        for part, interval in zip(parts, heads, strict=True):
            if add:
                target[:, slice(*interval)] += part
            else:
                target[:, slice(*interval)] = part

    def _copy(
        self, outgoing: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]
    ) -> None:
        dim = next(x.shape[2] for xs in outgoing for x in xs)
        both = self.split.q, self.split.kv
        heads = max(b - a + 2 * (d - c) for (a, b), (c, d) in zip(*both, strict=True))
        # As much as queries, keys and values, or their gradients, in float32 at the most.
        most = max(self.lengths) * heads * dim * 4 + 3 * ALIGNMENT
        copied_all_to_all(outgoing, targets, self.node, most, ledger=self.call.ledger)


def _arrivals(
    trades: list[_Trade], side: SideStream, tensors: list[Tensor]
) -> Iterator[list[Tensor]]:
    """The heads of one chunk after the other; the next ones come while one is computed."""
    coming = side.run(partial(trades[0].to_heads, trades[0].prepare(tensors)))
    # While the first chunk comes. Packing would have to wait for what is computed later on.
    prepared = [trade.prepare(tensors) for trade in trades[1:]]
    for i in range(len(trades)):
        here = coming
        if i + 1 < len(trades):
            start = side.run if i == 0 else side.run_at_once
            coming = start(partial(trades[i + 1].to_heads, prepared[i]))
        yield here.result()


def _together(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Which tensors are sent together: on a CPU calls are dear, on a GPU packing is."""
    every = list(range(len(tensors)))
    return [[i] for i in every] if tensors[0].is_cuda else [every]


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
