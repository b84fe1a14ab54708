"""Ring or gather inside nodes, ring or gather between them.

In round t the keys of the node t places before visit: each rank gets those of the rank at its own
place there, and its node works on them as on keys of its own. By ring they come whole from the node
next door, as far as some node needs them; by gather straight from who holds them, and of them just
those that some rank of this node sees, so that they cross between nodes once. What visits next is
under way during a round. In the backward a node adds up its gradients of the visitors in float32
and sends them home during the next round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from dist_attn.attention.accumulate import (
    RowSum,
    SoftmaxSum,
    accumulation_dtype,
    every_row,
    index_of,
)
from dist_attn.attention.gather import Gather, heads_of, together
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import Call, KeepsOwn, Residuals
from dist_attn.attention.workload import Fetch, HeadClass, Workload
from dist_attn.comm.exchange import Exchange, Transport

Pair = tuple[Tensor, Tensor]


class Inner(Protocol):
    """What works inside a node: adds to sums that go on over all rounds."""

    def add_forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, total: SoftmaxSum) -> None:
        """Add what the local queries see of all keys that the node holds."""

    def add_gradients(
        self, call: Call, residuals: Residuals, dout: Tensor, total: Gradients
    ) -> None:
        """Add the gradients of the local queries and of the keys that this rank holds."""


class TwoLevel(KeepsOwn):
    """See the module.

    Args:
        inner: what works inside a node.
        outer: how keys come from other nodes.
    """

    def __init__(self, inner: Inner, outer: Literal["ring", "gather"]) -> None:
        self._inner = inner
        self._whole = outer == "ring"
        # Heads that need different keys come apart where only what is needed is fetched.
        self._by_class = outer == "gather" or isinstance(inner, Gather)

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        visits = _Visits(call, (k, v), self._whole, self._by_class)
        totals = [SoftmaxSum(heads_of(q, c.q_heads), v.shape[-1]) for c in visits.classes]
        for number, (_, c) in enumerate(visits.stages):
            exchange = visits.transport.exchange()
            visits.bring_next(exchange, number)
            exchange.start()
            inner, kv = visits.inner_call(number), visits.here(c)
            if inner.work.needs.any():
                queries = heads_of(q, visits.classes[c].q_heads)
                self._inner.add_forward(inner, queries, *kv, totals[c])
            exchange.wait()
            visits.next(number)
        parts = [total.result() for total in totals]
        out = together([out for out, _ in parts], visits.classes, 1)
        lse = together([lse for _, lse in parts], visits.classes, 0)
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        q, k, v, out, lse = residuals
        visits = _Visits(call, (k, v), self._whole, self._by_class)
        dq = [RowSum(heads_of(q, c.q_heads)) for c in visits.classes]
        dkv = RowSum(k), RowSum(v)
        done: Pair | None = None
        for number in range(len(visits.stages) + 1):
            exchange = visits.transport.exchange()
            visits.bring_next(exchange, number)
            arriving = visits.send_home(exchange, number - 1, done)
            exchange.start()
            done = None
            if number < len(visits.stages):
                ahead, c = visits.stages[number]
                heads = visits.classes[c].q_heads
                of_q = [heads_of(x, heads) for x in (q, out, dout)]
                kept = (of_q[0], *visits.here(c), of_q[1], heads_of(lse, heads, 0))
                done = self._stage(visits.inner_call(number), kept, of_q[2], dq[c])
                if ahead == 0 and done is not None:
                    _add(dkv, done, visits.classes[c], None, k.shape[1])
                    done = None
            exchange.wait()
            if arriving is not None:
                _add(dkv, *arriving, k.shape[1])
            if number < len(visits.stages):
                visits.next(number)
        whole_dq = together([x.result() for x in dq], visits.classes, 1)
        return whole_dq, dkv[0].result(), dkv[1].result()

    def shares(self, call: Call) -> Iterator[tuple[Inner, Call]]:
        """What a call comes to inside this rank's node, round by round."""
        inner, outer = call.group.inner, call.group.outer
        assert inner is not None, "two levels need an inner and an outer group"
        assert outer is not None, "two levels need an inner and an outer group"
        classes = range(len(call.work.head_classes)) if self._by_class else [None]
        for ahead in range(outer.cp_size):
            for c in classes:
                work = call.work.visit(inner.cp_size, ahead, c, whole=self._whole)
                if work.needs.any():
                    yield self._inner, replace(call, work=work, group=inner, kept=None)

    def _stage(self, call: Call, kept: Residuals, dout: Tensor, dq: RowSum) -> Pair | None:
        """Add dq of one round, and return the gradients of the keys that visit this rank."""
        if not call.work.needs.any():
            return None
        sums = Gradients(*(RowSum(_wide(x)) for x in kept[:3]))
        self._inner.add_gradients(call, kept, dout.contiguous(), sums)
        dq.add_all(sums.dq.result())
        return sums.dk.result(), sums.dv.result()


class _Visits:
    """One rank's view of the rounds: which keys are here, and which come next."""

    def __init__(self, call: Call, kv: Pair, whole: bool, by_class: bool) -> None:
        inner, outer = call.group.inner, call.group.outer
        assert inner is not None, "two levels need an inner and an outer group"
        assert outer is not None, "two levels need an inner and an outer group"
        self._call, self._inner, self._outer = call, inner, outer
        self._whole, self._by_class = whole, by_class
        work = call.work
        every = HeadClass(tuple(range(len(work.heads))), tuple(range(work.num_kv_heads)))
        self.classes = work.head_classes if by_class else (every,)
        self.stages = [(a, c) for a in range(outer.cp_size) for c in range(len(self.classes))]
        self.transport = Transport(outer, call.ledger, {})
        self._own = kv
        #: What is here: the whole of a visit, or of one class of heads.
        self._here = self._coming = (kv[0].contiguous(), kv[1].contiguous())

    def inner_call(self, number: int) -> Call:
        """The node's work on what visits in a stage."""
        ahead, c = self.stages[number]
        work = self._call.work.visit(
            self._inner.cp_size, ahead, c if self._by_class else None, whole=self._whole
        )
        return replace(self._call, work=work, group=self._inner, kept=None)

    def here(self, c: int) -> Pair:
        """The keys and values that visit this rank, of a class of heads."""
        heads = self.classes[c].kv_heads
        if self._here[0].shape[1] == len(heads):
            return self._here
        keys, values = (heads_of(x, heads).contiguous() for x in self._here)
        return keys, values

    def bring_next(self, exchange: Exchange, number: int) -> None:
        """Add the messages that bring what the stage after this one visits."""
        if number + 1 >= len(self.stages):
            return
        ahead, c = self.stages[number + 1]
        if ahead == 0 or (self._whole and c > 0):
            self._coming = self._here
        elif self._whole:
            self._pass_on(exchange, ahead)
        else:
            self._fetch(exchange, ahead, c)

    def next(self, number: int) -> None:
        """Go on to the next stage."""
        self._here = self._coming

    def send_home(
        self, exchange: Exchange, number: int, done: Pair | None
    ) -> tuple[Pair, HeadClass, Fetch | None] | None:
        """Add the messages of a stage's gradients; return where those of the own keys arrive.

        With them, of which heads and of which keys they are.
        """
        if number < 0 or self.stages[number][0] == 0:
            return None
        ahead, c = self.stages[number]
        to, reader = self._outer.cp_rank - ahead, self._outer.cp_rank + ahead
        if done is not None and self._needed(self._outer.cp_rank, to):
            dtype = self._travel_dtype(self._outer.cp_rank, to)
            for x in done:
                exchange.send(x.to(dtype).contiguous(), to, "home", "dkv_between_nodes")
        if not self._needed(reader, self._outer.cp_rank):
            return None
        fetch = None if self._whole else self._fetched(reader, self._outer.cp_rank, c)
        rows = len(self._own[0]) if fetch is None else fetch.rows.num_rows
        shape = (rows, len(self.classes[c].kv_heads), self._own[0].shape[2])
        like = self._own[0].new_empty(0, dtype=self._travel_dtype(reader, self._outer.cp_rank))
        dk, dv = (exchange.receive(shape, like, reader, "home") for _ in range(2))
        return (dk, dv), self.classes[c], fetch

    def _pass_on(self, exchange: Exchange, ahead: int) -> None:
        """Send the visitor to the next node, and receive the one of the node before."""
        me = self._outer.cp_rank
        if ahead <= self._last_visit(me - ahead + 1):
            for x in self._here:
                exchange.send(x, me + 1, "kv", "kv_between_nodes")
        source = self._rank(me - ahead)
        rows = 0
        if ahead <= self._last_visit(me - ahead):
            rows = self._call.work.layout.local_seq_len(source)
        self._receive(exchange, (rows, *self._own[0].shape[1:]), me - 1)

    def _fetch(self, exchange: Exchange, ahead: int, c: int) -> None:
        """Send what another node needs of the own keys, and receive what this one needs."""
        me, kv_heads = self._outer.cp_rank, self.classes[c].kv_heads
        rows = self._fetched(me + ahead, me, c).rows
        for x in self._own:
            part = heads_of(rows.take(x), kv_heads).contiguous()
            exchange.send(part, me + ahead, "kv", "kv_between_nodes")
        num_rows = self._fetched(me, me - ahead, c).rows.num_rows
        shape = (num_rows, len(kv_heads), self._own[0].shape[2])
        self._receive(exchange, shape, me - ahead)

    def _receive(self, exchange: Exchange, shape: tuple[int, ...], sender: int) -> None:
        keys, values = (exchange.receive(shape, self._own[0], sender, "kv") for _ in range(2))
        self._coming = keys, values

    def _rank(self, node: int) -> int:
        """The rank at this one's place in a node, counted round the end."""
        return node % self._outer.cp_size * self._inner.cp_size + self._inner.cp_rank

    def _members(self, node: int) -> Sequence[int]:
        first = node % self._outer.cp_size * self._inner.cp_size
        return range(first, first + self._inner.cp_size)

    def _last_visit(self, node: int) -> int:
        return self._call.work.last_visit(self._rank(node), self._inner.cp_size)

    def _fetched(self, needing: int, holding: int, c: int) -> Fetch:
        """What a node needs of the keys of the rank at this one's place in another."""
        return self._call.work.node_fetch(self._members(needing), self._rank(holding), c)

    def _readers(self, needing: int, holding: int) -> int:
        """Ranks of a node that need keys of the rank at this one's place in another."""
        work: Workload = self._call.work
        return int(work.needs[list(self._members(needing)), self._rank(holding)].sum())

    def _needed(self, needing: int, holding: int) -> bool:
        return self._readers(needing, holding) > 0

    def _travel_dtype(self, needing: int, holding: int) -> torch.dtype:
        summed = self._readers(needing, holding) > 1
        return self._call.travel_dtype(self._own[0].dtype, summed=summed)


def _add(
    sums: tuple[RowSum, RowSum], parts: Pair, of: HeadClass, fetch: Fetch | None, num_heads: int
) -> None:
    """Add gradients of some keys of some of `num_heads` heads."""
    for total, part in zip(sums, parts, strict=True):
        rows = every_row(len(part)) if fetch is None else fetch.rows
        if len(of.kv_heads) == num_heads:
            total.add(rows, part)
        else:
            at = rows.index(part.device)[:, None], index_of(of.kv_heads, part.device)
            total.add_at(at, part)


def _wide(x: Tensor) -> Tensor:
    """Something of the shape of a tensor and its accumulation dtype, without its memory."""
    return x.new_empty(1, dtype=accumulation_dtype(x.dtype)).expand(x.shape)
