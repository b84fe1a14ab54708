"""Ring attention: keys and values travel round the group while each rank computes.

At step t a rank computes its queries against the keys of the rank t places before it, and meanwhile
sends these keys on and receives the next. A block travels no farther than the last rank that needs
it. In the backward the gradients of a block follow it one step later, in float32, and the last rank
that needed it sends them home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dist_attn_kernels.segments import Saved
from torch import Tensor

from dist_attn.attention.accumulate import RowSum, SoftmaxSum, accumulation_dtype
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import Call, KeepsOwn, Residuals
from dist_attn.attention.workload import Workload
from dist_attn.comm.exchange import Exchange


@dataclass(frozen=True)
class Travel:
    """How far each rank's block travels: the first and the last step at which it is needed.

    Both are 0 for a block that nobody else needs.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]


def travel(work: Workload) -> Travel:
    """Return the travels of all blocks, the same on every rank."""
    cp_size = work.layout.cp_size
    first, last = [], []
    for s in range(cp_size):
        steps = [t for t in range(1, cp_size) if work.needs[(s + t) % cp_size, s]]
        first.append(min(steps, default=0))
        last.append(max(steps, default=0))
    return Travel(tuple(first), tuple(last))


class Ring(KeepsOwn):
    """See the module."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        trip = _Trip(call, torch.stack([k, v]))
        total = SoftmaxSum(q, v.shape[-1])
        for t in range(call.group.cp_size):
            exchange = Exchange(call.group, call.ledger)
            trip.pass_on_kv(exchange, t)
            exchange.start()
            if trip.computes(t):
                step = call.work.step(trip.source(t))
                step.forward(call.kernel, q, trip.kv[0], trip.kv[1], total)
            exchange.wait()
            trip.next()
        out, lse = total.result()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        q, k, v, out, lse = residuals
        trip = _Trip(call, torch.stack([k, v]))
        dq, dk, dv = RowSum(q), RowSum(k), RowSum(v)
        dkv: Tensor | None = None
        for t in range(call.group.cp_size + 1):
            exchange = Exchange(call.group, call.ledger)
            trip.pass_on_kv(exchange, t)
            arriving = trip.pass_on_dkv(exchange, t, dkv)
            home = trip.bring_home(exchange, t, dkv)
            exchange.start()
            part = None
            if trip.computes(t):
                own = t == 0
                sums = (dk, dv) if own else (RowSum(trip.kv[0]), RowSum(trip.kv[1]))
                saved = Saved(dout, q, trip.kv[0], trip.kv[1], out, lse)
                step = call.work.step(trip.source(t))
                step.backward(call.kernel, saved, Gradients(dq, *sums))
                part = None if own else torch.stack([s.wide() for s in sums])
            exchange.wait()
            if part is not None and arriving is not None:
                part += arriving
            dkv = part if part is not None else arriving
            if home is not None:
                dk.add_all(home[0])
                dv.add_all(home[1])
            trip.next()
        return dq.result(), dk.result(), dv.result()


class _Trip:
    """One rank's view of the blocks that come by."""

    def __init__(self, call: Call, kv: Tensor) -> None:
        self.group = call.group
        self.work = call.work
        self.travel = travel(call.work)
        #: The block that is here now, [2, L, K, D], and the one that is arriving.
        self.kv = kv
        self._next_kv = kv
        self._own_shape = kv.shape

    def source(self, t: int) -> int:
        """Rank whose block is here at step t."""
        return (self.group.cp_rank - t) % self.group.cp_size

    def computes(self, t: int) -> bool:
        """Whether a local query needs the block that is here at step t."""
        if t >= self.group.cp_size:
            return False
        return bool(self.work.needs[self.group.cp_rank, self.source(t)])

    def pass_on_kv(self, exchange: Exchange, t: int) -> None:
        """Send this step's block on and receive the next step's, where somebody needs them."""
        if t + 1 >= self.group.cp_size:
            return
        if t + 1 <= self.travel.last[self.source(t)]:
            exchange.send(self.kv, self.group.cp_rank + 1, "kv")
        coming = self.source(t + 1)
        if t + 1 <= self.travel.last[coming]:
            self._next_kv = self.kv.new_empty(self._shape_of(coming))
            exchange.receive(self._next_kv, self.group.cp_rank - 1)

    def pass_on_dkv(self, exchange: Exchange, t: int, dkv: Tensor | None) -> Tensor | None:
        """Send the gradients of the last step's block after it; receive those of this step's."""
        last = self.source(t - 1)
        if t >= 2 and self.travel.first[last] <= t - 1 < self.travel.last[last]:
            assert dkv is not None, "the last step had gradients to pass on"
            exchange.send(dkv, self.group.cp_rank + 1, "dkv")
        here = self.source(t)
        if t < self.group.cp_size and 0 < self.travel.first[here] < t <= self.travel.last[here]:
            arriving = self._new_dkv(here)
            exchange.receive(arriving, self.group.cp_rank - 1)
            return arriving
        return None

    def bring_home(self, exchange: Exchange, t: int, dkv: Tensor | None) -> Tensor | None:
        """Send finished gradients to the block's owner; receive those of the own block."""
        last = self.source(t - 1)
        if t >= 2 and self.travel.last[last] == t - 1:
            assert dkv is not None, "the last step had gradients to bring home"
            exchange.send(dkv, last, "dkv")
        me = self.group.cp_rank
        if t >= 2 and self.travel.last[me] == t - 1:
            home = self._new_dkv(me)
            exchange.receive(home, me + t - 1)
            return home
        return None

    def next(self) -> None:
        """Make the block that arrived the present one."""
        self.kv = self._next_kv

    def _new_dkv(self, source: int) -> Tensor:
        return self.kv.new_empty(self._shape_of(source), dtype=accumulation_dtype(self.kv.dtype))

    def _shape_of(self, source: int) -> tuple[int, ...]:
        return (2, self.work.layout.local_seq_len(source), *self._own_shape[2:])
