"""Gather: each rank fetches just the keys and values that its queries see, from who holds them.

In stage t a rank fetches from the rank t places before it and sends to the rank t places behind it,
while it computes the stage before. Key/value heads of which different keys are needed are fetched
separately, so that a pattern shifted from head to head moves no more than it reads. Gradients go
back the same way one stage later, and are added up in float32 in the order of the stages. Keys
that lie in sequence are sent from where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn.attention.accumulate import Rows, RowSum, SoftmaxSum, every_row, index_of
from dist_attn.attention.own_step import OwnStep
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import AddsGradients, Call, Residuals
from dist_attn.attention.workload import HeadClass
from dist_attn.comm.exchange import Exchange
from dist_attn_kernels.segments import Saved


class Gather(AddsGradients):
    """See the module."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        classes = call.work.head_classes
        if len(classes) == 1:
            total = SoftmaxSum(q, v.shape[-1])
            self.add_forward(call, q, k, v, total)
            out, lse = total.result()
            return out, lse, (q, k, v, out, lse)
        fetcher = _Fetcher(call, k, v)
        transport = call.open_transport(k, backward=False)
        queries = [heads_of(q, c.q_heads) for c in classes]
        totals = [SoftmaxSum(x, v.shape[-1]) for x in queries]
        for t in range(call.group.cp_size):
            exchange = transport.exchange()
            coming = fetcher.start(exchange, t + 1)
            exchange.start()
            if t == 0:
                # Nothing had to be fetched, so all heads are computed together.
                whole = SoftmaxSum(q, v.shape[-1])
                call.work.step(call.group.cp_rank).forward(call.kernel, q, k, v, whole)
                out, lse = whole.result()
                for head_class, total in zip(classes, totals, strict=True):
                    part = (heads_of(x, head_class.q_heads, d) for x, d in ((out, 1), (lse, 0)))
                    total.add(every_row(len(q)), *part)
            else:
                for c, total in enumerate(totals):
                    step = call.work.fetched_step(fetcher.source(t), c)
                    step.forward(call.kernel, queries[c], *fetcher.here[c], total)
            exchange.wait()
            fetcher.here = coming
        parts = [total.result() for total in totals]
        out = together([out for out, _ in parts], classes, 1)
        lse = together([lse for _, lse in parts], classes, 0)
        return out, lse, (q, k, v, out, lse)

    def add_forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, total: SoftmaxSum) -> None:
        """Add what the local queries see of all keys that the group holds: one class of heads."""
        assert len(call.work.head_classes) == 1, "heads that need different keys come apart"
        fetcher = _Fetcher(call, k, v)
        transport = call.open_transport(k, backward=False)
        for t in range(call.group.cp_size):
            exchange = transport.exchange()
            coming = fetcher.start(exchange, t + 1)
            exchange.start()
            if t == 0:
                call.work.step(call.group.cp_rank).forward(call.kernel, q, k, v, total)
            else:
                step = call.work.fetched_step(fetcher.source(t), 0)
                step.forward(call.kernel, q, *fetcher.here[0], total)
            exchange.wait()
            fetcher.here = coming

    def add_gradients(
        self, call: Call, residuals: Residuals, dout: Tensor, total: Gradients
    ) -> None:
        """See `AddsGradients`."""
        q, k, v, out, lse = residuals
        fetcher = _Fetcher(call, k, v)
        transport = call.open_transport(k, backward=True)
        saved = _ByClass(call, Saved(dout, q, k, v, out, lse))
        own = OwnStep(call, saved.whole, total)
        done: list[tuple[Tensor, Tensor]] = []
        for t in range(call.group.cp_size + 1):
            exchange = transport.exchange()
            coming = fetcher.start(exchange, t + 1)
            returning = fetcher.start_return(exchange, t - 1, done)
            exchange.start()
            done = []
            if t == 0:
                own.first_half()
            elif t < call.group.cp_size:
                done = saved.backward(fetcher.source(t), fetcher.here)
            else:
                own.second_half()
            exchange.wait()
            # Where they are the next but one will be; the last ones may stay.
            fetcher.add_returned(returning, t - 1, total, keep=t == call.group.cp_size)
            fetcher.here = coming
        for rows, part in saved.dq():
            total.dq.add(rows, part)


class _ByClass:
    """The backward of fetched keys: what the forward left, for each class of heads."""

    def __init__(self, call: Call, whole: Saved) -> None:
        self.whole = whole
        self._call = call
        self._classes = call.work.head_classes
        # A rank alone fetches nothing, and would copy heads for nothing.
        classes = self._classes if call.group.cp_size > 1 else ()
        self._queries = [
            tuple(heads_of(x, c.q_heads) for x in (whole.dout, whole.q, whole.out)) for c in classes
        ]
        self._norms = [heads_of(whole.lse, c.q_heads, 0) for c in classes]
        self._dq = [RowSum(q) for _, q, _ in self._queries]

    def backward(
        self, source: int, fetched: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Add this stage's dq, and return its dk and dv of each class."""
        gradients = []
        for c, (keys, values) in enumerate(fetched):
            dout, q, out = self._queries[c]
            saved = Saved(dout, q, keys, values, out, self._norms[c])
            sums = Gradients(self._dq[c], RowSum(keys), RowSum(values))
            self._call.work.fetched_step(source, c).backward(self._call.kernel, saved, sums)
            gradients.append((sums.dk.result(), sums.dv.result()))
        return gradients

    def dq(self) -> list[tuple[Rows, Tensor]]:
        """What the stages come to, for all heads; nothing if no query saw a fetched key."""
        if len(self._dq) == 1:
            return self._dq[0].parts()
        if not any(x.parts() for x in self._dq):
            return []
        whole = together([x.result() for x in self._dq], self._classes, 1)
        return [(every_row(len(whole)), whole)]


class _Fetcher:
    """One rank's messages. `here` holds, for each head class, the keys and values of this stage."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self.work = call.work
        self.cp_rank = call.group.cp_rank
        self.cp_size = call.group.cp_size
        self.dtype = call.travel_dtype(k.dtype, summed=False)
        #: An empty tensor like the gradients that travel.
        self.travels = k.new_empty(0, dtype=self.dtype)
        self.k, self.v = k, v
        self.here: list[tuple[Tensor, Tensor]] = []

    def source(self, t: int) -> int:
        """Rank whose keys are here in stage t."""
        return (self.cp_rank - t) % self.cp_size

    def start(self, exchange: Exchange, t: int) -> list[tuple[Tensor, Tensor]]:
        """Add the messages of stage t's keys and values; return where they arrive."""
        if t >= self.cp_size:
            return []
        to, source = (self.cp_rank + t) % self.cp_size, self.source(t)
        arriving = []
        for c, head_class in enumerate(self.work.head_classes):
            rows = self.work.fetch(to, self.cp_rank, c).rows
            for x in (self.k, self.v):
                part = heads_of(rows.take(x), head_class.kv_heads)
                exchange.send(part.contiguous(), to, "kv")
            num_rows = self.work.fetch(self.cp_rank, source, c).rows.num_rows
            shape = (num_rows, len(head_class.kv_heads), self.k.shape[2])
            keys, values = (exchange.receive(shape, self.k, source, "kv") for _ in range(2))
            arriving.append((keys, values))
        return arriving

    def start_return(
        self, exchange: Exchange, t: int, done: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Add the messages of stage t's gradients; return where those of the own keys arrive."""
        if t < 1:
            return []
        reader, source = (self.cp_rank + t) % self.cp_size, self.source(t)
        arriving = []
        for c, gradients in enumerate(done):
            for x in gradients:
                exchange.send(x.to(self.dtype).contiguous(), source, "dkv")
            num_rows = self.work.fetch(reader, self.cp_rank, c).rows.num_rows
            shape = (num_rows, len(self.work.head_classes[c].kv_heads), self.k.shape[2])
            dk, dv = (exchange.receive(shape, self.travels, reader, "dkv") for _ in range(2))
            arriving.append((dk, dv))
        return arriving

    def add_returned(
        self, returned: list[tuple[Tensor, Tensor]], t: int, total: Gradients, *, keep: bool
    ) -> None:
        """Add the gradients of the own keys from stage t's reader; `keep`: they stay there."""
        reader = (self.cp_rank + t) % self.cp_size
        for c, gradients in enumerate(returned):
            rows = self.work.fetch(reader, self.cp_rank, c).rows
            kv_heads = self.work.head_classes[c].kv_heads
            for sum_, part in zip((total.dk, total.dv), gradients, strict=True):
                if len(kv_heads) == self.k.shape[1]:
                    sum_.add(rows, part if keep else part.clone())
                else:
                    at = rows.index(part.device)[:, None], index_of(kv_heads, part.device)
                    sum_.add_at(at, part)


def heads_of(x: Tensor, heads: tuple[int, ...], dim: int = 1) -> Tensor:
    """Some heads of a tensor, itself for all."""
    if len(heads) == x.shape[dim]:
        return x
    return x.index_select(dim, index_of(heads, x.device))


def together(parts: list[Tensor], classes: tuple[HeadClass, ...], dim: int) -> Tensor:
    """Put the classes' query heads back in their order."""
    if len(parts) == 1:
        return parts[0]
    order = index_of(tuple(h for c in classes for h in c.q_heads), parts[0].device)
    whole = torch.cat(parts, dim)
    return torch.empty_like(whole).index_copy_(dim, order, whole)
