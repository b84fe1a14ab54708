"""Gather: each rank fetches just the keys and values that its queries see, from who holds them.

In stage t a rank fetches from the rank t places before it and sends to the rank t places behind it,
while it computes the stage before. Key/value heads of which different keys are needed are fetched
separately, so that a pattern shifted from head to head moves no more than it reads. Gradients go
back the same way one stage later, and are added up in float32 in the order of the stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn.attention.accumulate import RowSum, SoftmaxSum, accumulation_dtype, index_of
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import Call, KeepsOwn, Residuals
from dist_attn.attention.workload import HeadClass
from dist_attn.comm.exchange import Exchange
from dist_attn_kernels.segments import Saved


class Gather(KeepsOwn):
    """See the module."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        classes = call.work.head_classes
        fetcher = _Fetcher(call, k, v)
        queries = [_heads(q, c.q_heads) for c in classes]
        totals = [SoftmaxSum(x, v.shape[-1]) for x in queries]
        for t in range(call.group.cp_size):
            exchange = Exchange(call.group, call.ledger)
            coming = fetcher.start(exchange, t + 1)
            exchange.start()
            for c, total in enumerate(totals):
                step = call.work.fetched_step(fetcher.source(t), c)
                step.forward(call.kernel, queries[c], *fetcher.here[c], total)
            exchange.wait()
            fetcher.here = coming
        parts = [total.result() for total in totals]
        out = _together([out for out, _ in parts], classes, 1)
        lse = _together([lse for _, lse in parts], classes, 0)
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        q, k, v, out, lse = residuals
        classes = call.work.head_classes
        fetcher = _Fetcher(call, k, v)
        local = [[_heads(x, c.q_heads) for c in classes] for x in (dout, q, out)]
        norms = [_heads(lse, c.q_heads, 0) for c in classes]
        dq = [RowSum(x) for x in local[1]]
        dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (k, v))
        done: list[Tensor] = []
        for t in range(call.group.cp_size + 1):
            exchange = Exchange(call.group, call.ledger)
            coming = fetcher.start(exchange, t + 1)
            returning = fetcher.start_return(exchange, t - 1, done)
            exchange.start()
            done = []
            for c in range(len(classes) if t < call.group.cp_size else 0):
                keys, values = fetcher.here[c]
                sums = Gradients(dq[c], RowSum(keys), RowSum(values))
                saved = Saved(local[0][c], local[1][c], keys, values, local[2][c], norms[c])
                step = call.work.fetched_step(fetcher.source(t), c)
                step.backward(call.kernel, saved, sums)
                done.append(torch.stack([sums.dk.wide(), sums.dv.wide()]))
            exchange.wait()
            if t == 0:
                returning, done = done, []
            fetcher.add_returned(returning, t - 1, dk, dv)
            fetcher.here = coming
        whole_dq = _together([x.result() for x in dq], classes, 1)
        return whole_dq, dk.to(k.dtype), dv.to(v.dtype)


class _Fetcher:
    """One rank's messages. `here` holds, for each head class, the keys and values of this stage."""

    def __init__(self, call: Call, k: Tensor, v: Tensor) -> None:
        self.work = call.work
        self.cp_rank = call.group.cp_rank
        self.cp_size = call.group.cp_size
        self.dtype = call.gradient_dtype
        self.k, self.v = k, v
        self.here = [(_heads(k, c.kv_heads), _heads(v, c.kv_heads)) for c in call.work.head_classes]

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
            parts = [_heads(rows.take(x), head_class.kv_heads) for x in (self.k, self.v)]
            exchange.send(torch.stack(parts), to, "kv")
            buffer = self._buffer(self.cp_rank, source, c, self.k.dtype)
            exchange.receive(buffer, source)
            arriving.append((buffer[0], buffer[1]))
        return arriving

    def start_return(self, exchange: Exchange, t: int, done: list[Tensor]) -> list[Tensor]:
        """Add the messages of stage t's gradients; return where those of the own keys arrive."""
        if t < 1:
            return []
        reader, source = (self.cp_rank + t) % self.cp_size, self.source(t)
        arriving = []
        for c, gradients in enumerate(done):
            exchange.send(gradients.to(self.dtype), source, "dkv")
            buffer = self._buffer(reader, self.cp_rank, c, self.dtype)
            exchange.receive(buffer, reader)
            arriving.append(buffer)
        return arriving

    def add_returned(self, returned: list[Tensor], t: int, dk: Tensor, dv: Tensor) -> None:
        """Add gradients of the own keys: those from stage t's reader, or for t < 1 the own ones."""
        for c, gradients in enumerate(returned):
            kv_heads = index_of(self.work.head_classes[c].kv_heads, dk.device)
            if t < 1:
                dk.index_add_(1, kv_heads, gradients[0])
                dv.index_add_(1, kv_heads, gradients[1])
                continue
            reader = (self.cp_rank + t) % self.cp_size
            rows = self.work.fetch(reader, self.cp_rank, c).rows.index(dk.device)[:, None]
            dk[rows, kv_heads] += gradients[0].to(dk.dtype)
            dv[rows, kv_heads] += gradients[1].to(dv.dtype)

    def _buffer(self, needing: int, holding: int, c: int, dtype: torch.dtype) -> Tensor:
        num_rows = self.work.fetch(needing, holding, c).rows.num_rows
        num_heads = len(self.work.head_classes[c].kv_heads)
        return self.k.new_empty((2, num_rows, num_heads, self.k.shape[2]), dtype=dtype)


def _heads(x: Tensor, heads: tuple[int, ...], dim: int = 1) -> Tensor:
    if len(heads) == x.shape[dim]:
        return x
    return x.index_select(dim, index_of(heads, x.device))


def _together(parts: list[Tensor], classes: tuple[HeadClass, ...], dim: int) -> Tensor:
    """Put the classes' query heads back in their order."""
    if len(parts) == 1:
        return parts[0]
    order = index_of(tuple(h for c in classes for h in c.q_heads), parts[0].device)
    whole = torch.cat(parts, dim)
    return torch.empty_like(whole).index_copy_(dim, order, whole)
