"""The interface of a strategy: one attention call carried out by the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_attn.attention.accumulate import RowSum, SoftmaxSum, accumulation_dtype
from dist_attn.attention.context import KeptAttention
from dist_attn.attention.step import Gradients, Kernel
from dist_attn.attention.workload import Workload
from dist_attn.comm.exchange import LaneName, Transport, open_transport
from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup
from dist_attn.peer_memory import ALIGNMENT
from dist_attn_kernels.segments import Saved


@dataclass(frozen=True)
class Call:
    """What a strategy needs beside the tensors.

    Attributes:
        work: what is to be computed.
        group: the ranks that take part.
        kernel: how a step is computed.
        gradient_dtype: in what gradients of keys and values travel; they add up in float32. None:
            those of one rank's queries in the type of the keys, as a kernel returns them, and sums
            of several ranks' in float32.
        ledger: counts what is sent.
        kept: where a layer that is computed twice keeps its first result.
    """

    work: Workload
    group: CommGroup
    kernel: Kernel
    gradient_dtype: torch.dtype | None
    ledger: Ledger | None = None
    kept: KeptAttention | None = None

    def open_transport(self, k: Tensor, *, backward: bool) -> Transport:
        """Prepare the exchanges of keys and values like `k`, and in a backward their gradients'."""
        rows = max(self.work.keys.local_seq_lens)
        numel = 2 * rows * k.shape[1] * k.shape[2]
        # Heads that are sent apart begin at aligned places.
        apart = 2 * ALIGNMENT * len(self.work.head_classes)
        lanes: dict[LaneName, int] = {"kv": numel * k.element_size() + apart}
        if backward:
            wide = self.travel_dtype(k.dtype, summed=True).itemsize
            own = self.travel_dtype(k.dtype, summed=False).itemsize
            lanes["dkv"] = lanes["home"] = numel * max(wide, own) + apart
        return open_transport(self.group, self.ledger, lanes)

    def travel_dtype(self, dtype: torch.dtype, summed: bool) -> torch.dtype:
        """In what gradients travel of keys of some dtype, of one rank or added up over several."""
        if self.gradient_dtype is not None:
            return self.gradient_dtype
        return accumulation_dtype(dtype) if summed else dtype


#: Tensors that a computation keeps for its backward: q, k, v, out and lse.
NUM_KEPT = 5
#: What the forward keeps for the backward; which tensors these are is the strategy's own business.
Residuals = tuple[Tensor, ...]


class Strategy(Protocol):
    """Forward and backward of one strategy. Every rank of the group calls them together.

    Attributes:
        keeps_own: whether the residuals are just q, k, v, out and lse of the local tokens.
    """

    keeps_own: bool

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """Return out [L, H, D], lse [H, L] if wanted, and what the backward needs."""

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the local q, k and v."""

    def num_kept(self, call: Call) -> int:
        """How many residuals there are."""

    def unflatten(self, call: Call, flat: Residuals, head_dim: int) -> Residuals:
        """Give residuals that are not `keeps_own` their shapes back after flattening."""


class KeepsOwn:
    """Base of strategies whose residuals are q, k, v, out and lse of the local tokens."""

    keeps_own = True

    def num_kept(self, call: Call) -> int:
        """See `Strategy`."""
        return NUM_KEPT

    def unflatten(self, call: Call, flat: Residuals, head_dim: int) -> Residuals:
        """See `Strategy`."""
        raise AssertionError("what the caller has is not kept again")


class AddsGradients(KeepsOwn):
    """Base of strategies that add their gradients to sums, which may hold more already."""

    def backward(
        self, call: Call, residuals: Residuals, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Strategy`."""
        total = Gradients(*(RowSum(x) for x in residuals[:3]))
        self.add_gradients(call, residuals, dout, total)
        return total.dq.result(), total.dk.result(), total.dv.result()

    def add_gradients(
        self, call: Call, residuals: Residuals, dout: Tensor, total: Gradients
    ) -> None:
        """Add the gradients of the local queries and of the local keys. Collective."""
        raise AssertionError("a strategy defines this")


def forward_once(
    strategy: Strategy, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
) -> tuple[Tensor, Tensor | None, Residuals]:
    """Forward of a strategy; of one that keeps its own, a second one takes the first one's result.

    Collective: none in the second forward.
    """
    if call.kept is None or not strategy.keeps_own:
        return strategy.forward(call, q, k, v, with_lse)
    found = call.kept.take(call.work.heads)
    if found is not None:
        out, lse = found
        return out, lse, (q, k, v, out, lse)
    result = strategy.forward(call, q, k, v, with_lse)
    call.kept.put(call.work.heads, *result[2][3:])
    return result


class Local(AddsGradients):
    """The strategy of a group of one."""

    def forward(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Residuals]:
        """See `Strategy`."""
        total = SoftmaxSum(q, v.shape[-1])
        call.work.step(0).forward(call.kernel, q, k, v, total)
        out, lse = total.result()
        return out, lse, (q, k, v, out, lse)

    def add_gradients(
        self, call: Call, residuals: Residuals, dout: Tensor, total: Gradients
    ) -> None:
        """See `AddsGradients`."""
        q, k, v, out, lse = residuals
        call.work.step(0).backward(call.kernel, Saved(dout, q, k, v, out, lse), total)
