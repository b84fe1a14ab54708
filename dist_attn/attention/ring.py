"""Ring attention: keys and values travel round the group while each rank computes.

At step t a rank computes its queries against the keys of the rank t places before it, and meanwhile
sends these keys on and receives the next. A block travels no farther than the last rank that needs
it. In the backward the gradients of a block follow it one step later, each rank adds its own in
float32, and the last rank that needed it sends them home, which half of the own block's backward
hides.

A double ring goes round inside each node, and from node to node between the rounds: at the start of
a round a rank sends the block that it has to its place in the next node, which has the whole round
to arrive. In the backward every node sends its gradients home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_attn.attention.accumulate import RowSum, SoftmaxSum
from dist_attn.attention.own_step import OwnStep
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import AddsGradients, Call, Residuals
from dist_attn.attention.workload import Workload
from dist_attn.comm.exchange import Exchange, LaneName, Transport
from dist_attn_kernels.segments import Saved

#: Keys and values, or their gradients.
Pair = tuple[Tensor, Tensor]
#: Of a round in which nobody needs a block: no first and no last place.
NOBODY = (0, -1)


@dataclass(frozen=True)
class Route:
    """How far one rank's block travels.

    Attributes:
        rounds: for each node, beginning with the block's own, the first and the last place of the
            round at which it is needed, counted from the block's own place.
    """

    rounds: tuple[tuple[int, int], ...]

    @property
    def last_round(self) -> int:
        """The last node that needs the block, counted from its own."""
        return max((a for a, r in enumerate(self.rounds) if r != NOBODY), default=0)


def route(work: Workload, source: int, inner_size: int) -> Route:
    """Return the route of a block, the same on every rank."""
    num_nodes = work.layout.cp_size // inner_size
    node, place = divmod(source, inner_size)
    rounds = []
    for a in range(num_nodes):
        first_rank = (node + a) % num_nodes * inner_size
        needing = [
            b
            for b in range(inner_size)
            if (a, b) != (0, 0) and work.needs[first_rank + (place + b) % inner_size, source]
        ]
        rounds.append((needing[0], needing[-1]) if needing else NOBODY)
    return Route(tuple(rounds))


class Ring(AddsGradients):
    """See the module.

    Args:
        double: go round inside nodes and between them; the group has an inner and an outer one.
    """

    def __init__(self, double: bool = False) -> None:
        self._double = double

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        total = SoftmaxSum(q, v.shape[-1])
        self.add_forward(call, q, k, v, total)
        out, lse = total.result()
        return out, lse, (q, k, v, out, lse)

    def add_forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, total: SoftmaxSum) -> None:
        """Add what the local queries see of all keys that the group holds."""
        trip = _Trip(call, (k, v), self._double)
        transport = trip.open_transport(backward=False)
        for t in range(call.group.cp_size):
            exchange = transport.exchange()
            trip.pass_on_kv(exchange, t)
            exchange.start()
            if trip.computes(t):
                call.work.step(trip.source(t)).forward(call.kernel, q, *trip.kv, total)
            exchange.wait()
            trip.next(t)

    def add_gradients(
        self, call: Call, residuals: Residuals, dout: Tensor, total: Gradients
    ) -> None:
        """See `AddsGradients`."""
        q, k, v, out, lse = residuals
        trip = _Trip(call, (k, v), self._double)
        transport = trip.open_transport(backward=True)
        own = OwnStep(call, Saved(dout, q, k, v, out, lse), total)
        dkv: Pair | None = None
        for t in range(call.group.cp_size + 1):
            exchange = transport.exchange()
            # In two levels the way home is not inside the node.
            homeward = (
                Transport(call.group, call.ledger, {}).exchange() if trip.double else exchange
            )
            trip.pass_on_kv(exchange, t)
            arriving = trip.pass_on_dkv(exchange, t, dkv)
            home = trip.bring_home(homeward, t, dkv)
            exchange.start()
            if trip.double:
                homeward.start()
            part: Pair | None = None
            if t == 0:
                own.first_half()
            elif trip.computes(t):
                part = self._fetched(call, trip, t, own.saved, total.dq)
            elif t == call.group.cp_size:
                own.second_half()
            exchange.wait()
            if trip.double:
                homeward.wait()
            if part is not None and arriving is not None:
                dkv = part[0].add_(arriving[0]), part[1].add_(arriving[1])
            else:
                dkv = part if part is not None else arriving
            if home is not None:
                # Where they are the next but one will be; the last ones may stay.
                keep = t == call.group.cp_size
                total.dk.add_all(home[0] if keep else home[0].clone())
                total.dv.add_all(home[1] if keep else home[1].clone())
            trip.next(t)

    def _fetched(self, call: Call, trip: _Trip, t: int, saved: Saved, dq: RowSum) -> Pair:
        """Gradients of the block that is here: in float32 if those of other ranks are added."""
        keys, values = trip.kv
        sums = Gradients(dq, RowSum(keys), RowSum(values))
        here = replace(saved, k=keys, v=values)
        call.work.step(trip.source(t)).backward(call.kernel, here, sums)
        if trip.alone(t):
            return sums.dk.result(), sums.dv.result()
        return sums.dk.wide(), sums.dv.wide()


class _Trip:
    """One rank's view of the blocks that come by: at step t, place t % n of round t // n."""

    def __init__(self, call: Call, kv: Pair, double: bool) -> None:
        group = call.group
        assert not double or (group.inner is not None and group.outer is not None)
        self.double = double
        self.inner = group.inner if double and group.inner is not None else group
        self._call = call
        self._cp_rank, self._cp_size = group.cp_rank, group.cp_size
        self._places = self.inner.cp_size
        self._rounds = group.cp_size // self._places
        self._routes = [route(call.work, s, self._places) for s in range(group.cp_size)]
        #: The block that is here now, keys and values [L, K, D]; those that arrive from next door
        #: and from the next node.
        self.kv: Pair = (kv[0].contiguous(), kv[1].contiguous())
        self._next_kv = self._next_node_kv = self.kv
        self._between_nodes: Exchange | None = None

    def open_transport(self, *, backward: bool) -> Transport:
        """Prepare the exchanges inside the node."""
        if self.double:
            return Transport(self.inner, self._call.ledger, {})
        return self._call.open_transport(self.kv[0], backward=backward)

    def source(self, t: int) -> int:
        """Rank whose block is here at step t."""
        a, b = divmod(t, self._places)
        node, place = divmod(self._cp_rank, self._places)
        return (node - a) % self._rounds * self._places + (place - b) % self._places

    def computes(self, t: int) -> bool:
        """Whether a local query needs the block that is here at step t."""
        return t < self._cp_size and bool(self._call.work.needs[self._cp_rank, self.source(t)])

    def alone(self, t: int) -> bool:
        """Whether no other rank of this node adds to the gradients of step t's block."""
        a, b = divmod(t, self._places)
        return self._routes[self.source(t)].rounds[a] == (b, b)

    def pass_on_kv(self, exchange: Exchange, t: int) -> None:
        """Send this step's block on and receive the next one's, where somebody needs them."""
        a, b = divmod(t, self._places)
        if b == 0 and a + 1 < self._rounds:
            self._pass_to_next_node(t, a)
        if a >= self._rounds or b + 1 >= self._places:
            return
        if b + 1 <= self._last(self.source(t), a):
            self._send(exchange, self.kv, self.inner.cp_rank + 1, "kv")
        coming = self.source(t + 1)
        if b + 1 <= self._last(coming, a):
            self._next_kv = self._receive(exchange, coming, self.kv[0], self.inner.cp_rank - 1)

    def pass_on_dkv(self, exchange: Exchange, t: int, dkv: Pair | None) -> Pair | None:
        """Send the gradients of the last step's block after it; receive those of this step's."""
        if t >= 1:
            a, b = divmod(t - 1, self._places)
            first, last = self._routes[self.source(t - 1)].rounds[a]
            if first <= b < last:
                assert dkv is not None, "the last step had gradients to pass on"
                self._send_dkv(exchange, t - 1, dkv, self.inner.cp_rank + 1, "dkv")
        a, b = divmod(t, self._places)
        if a >= self._rounds:
            return None
        first, last = self._routes[self.source(t)].rounds[a]
        if not first < b <= last:
            return None
        like = self._like(self.source(t), a)
        return self._receive(exchange, self.source(t), like, self.inner.cp_rank - 1, "dkv")

    def bring_home(self, exchange: Exchange, t: int, dkv: Pair | None) -> Pair | None:
        """Send a node's finished gradients to the block's owner; receive those of the own block."""
        if t == 0:
            return None
        a, b = divmod(t - 1, self._places)
        source = self.source(t - 1)
        if b == self._last(source, a):
            assert dkv is not None, "the last step had gradients to bring home"
            self._send_dkv(exchange, t - 1, dkv, source, "home")
        if b != self._last(self._cp_rank, a):
            return None
        node, place = divmod(self._cp_rank, self._places)
        last_rank = (node + a) % self._rounds * self._places + (place + b) % self._places
        like = self._like(self._cp_rank, a)
        return self._receive(exchange, self._cp_rank, like, last_rank, "home")

    def next(self, t: int) -> None:
        """Make the block of the next step the present one."""
        if (t + 1) % self._places == 0 and self._between_nodes is not None:
            self._between_nodes.wait()
            self._between_nodes = None
            self.kv = self._next_node_kv
        else:
            self.kv = self._next_kv

    def _pass_to_next_node(self, t: int, a: int) -> None:
        outer = self._call.group.outer
        assert outer is not None
        self._between_nodes = Transport(outer, self._call.ledger, {}).exchange()
        if a + 1 <= self._routes[self.source(t)].last_round:
            self._send(self._between_nodes, self.kv, outer.cp_rank + 1, "kv", "kv_between_nodes")
        coming = self.source(t + self._places)
        if a + 1 <= self._routes[coming].last_round:
            self._next_node_kv = self._receive(
                self._between_nodes, coming, self.kv[0], outer.cp_rank - 1
            )
        self._between_nodes.start()

    def _last(self, source: int, a: int) -> int:
        return self._routes[source].rounds[a][1]

    def _travel_dtype(self, source: int, a: int) -> torch.dtype:
        first, last = self._routes[source].rounds[a]
        return self._call.travel_dtype(self.kv[0].dtype, summed=first != last)

    def _like(self, source: int, a: int) -> Tensor:
        """An empty tensor like the gradients of a block that travel."""
        return self.kv[0].new_empty(0, dtype=self._travel_dtype(source, a))

    def _send_dkv(self, exchange: Exchange, t: int, dkv: Pair, to: int, lane: LaneName) -> None:
        dtype = self._travel_dtype(self.source(t), t // self._places)
        packed = (dkv[0].to(dtype).contiguous(), dkv[1].to(dtype).contiguous())
        self._send(exchange, packed, to, lane, "dkv")

    def _send(
        self, exchange: Exchange, pair: Pair, to: int, lane: LaneName, kind: str | None = None
    ) -> None:
        for x in pair:
            exchange.send(x, to, lane, kind)

    def _receive(
        self, exchange: Exchange, source: int, like: Tensor, sender: int, lane: LaneName = "kv"
    ) -> Pair:
        """Return where the block of `source` will be, or its gradients."""
        shape = (self._call.work.keys.local_seq_len(source), *self.kv[0].shape[1:])
        keys, values = (exchange.receive(shape, like, sender, lane) for _ in range(2))
        return keys, values
