"""The backward of a rank's queries against its own keys, in two halves of the heads.

It needs nothing from other ranks. So one half is computed while the first keys arrive, and the
other one at the end, while the last gradients travel home.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_attn.attention.accumulate import RowSum
from dist_attn.attention.step import Gradients
from dist_attn.attention.strategy import Call
from dist_attn_kernels.segments import Saved


@dataclass(frozen=True)
class OwnStep:
    """The two halves; `saved` and `total` are those of all heads.

    A rank alone, and one key/value head, are computed as a whole, at first.
    """

    call: Call
    saved: Saved
    total: Gradients

    def first_half(self) -> None:
        """Compute what is computed before everything else."""
        self._compute(0)

    def second_half(self) -> None:
        """Compute the rest, if there is one."""
        if self._in_halves:
            self._compute(1)

    @property
    def _in_halves(self) -> bool:
        return self.call.group.cp_size > 1 and self.call.work.num_kv_heads > 1

    def _compute(self, half: int) -> None:
        work, s = self.call.work, self.saved
        if not self._in_halves:
            work.step(work.cp_rank).backward(self.call.kernel, s, self.total)
            return
        q_heads, kv_heads = work.half_heads(half)
        saved = Saved(
            s.dout[:, q_heads], s.q[:, q_heads], s.k[:, kv_heads], s.v[:, kv_heads],
            s.out[:, q_heads], s.lse[q_heads],
        )  # fmt: skip
        sums = Gradients(RowSum(saved.q), RowSum(saved.k), RowSum(saved.v))
        work.half_step(half).backward(self.call.kernel, saved, sums)
        self.total.dq.add_heads(q_heads, sums.dq.result())
        self.total.dk.add_heads(kv_heads, sums.dk.result())
        self.total.dv.add_heads(kv_heads, sums.dv.result())
