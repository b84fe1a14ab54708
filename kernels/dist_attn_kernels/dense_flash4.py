"""flash-attn-4 on packed segments, where the user has installed it and it computes rightly here.

Its documented functions differentiate through autograd and keep lse to themselves. A ring's
backward hands in an out and lse of more keys, so the two functions beneath them are called, as
torch's own registration of FA4 does. Their names are not promised: each is taken by the parameters
it has, and each shape of call by a small trial against plain torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_attn_kernels import reference
from dist_attn_kernels.segments import Saved, Segments

MODULE = "flash_attn.cute.interface"
_PACKED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
#: What each function must take, by name.
NEEDED = {
    "_flash_attn_fwd": {"q", "k", "v", "softmax_scale", "causal", "return_lse"} | _PACKED,
    "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal"} | _PACKED,
}
#: Largest relative error in the trial; of 16-bit kernels some 4e-3 is usual.
TRIAL_BOUND = 2e-2


@dataclass(frozen=True)
class Interface:
    """The two functions of flash-attn-4."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def find_interface() -> Interface | str:
    """flash-attn-4's functions, or why there are none; the answer is kept."""
    try:
        module = importlib.import_module(MODULE)
    except ImportError as problem:
        return f"flash-attn-4 is not installed ({problem})"
    except Exception as problem:  # an import that looks at devices and drivers may raise anything
        return f"flash-attn-4 cannot be imported ({type(problem).__name__}: {problem})"
    found = []
    for name, words in NEEDED.items():
        function = getattr(module, name, None)
        if function is None:
            return f"this flash-attn-4 has no {name}"
        missing = words - set(inspect.signature(function).parameters)
        if missing:
            return f"{name} of this flash-attn-4 does not take {', '.join(sorted(missing))}"
        found.append(function)
    return Interface(*found)


class Flash4Backend:
    """flash-attn-4, all segments in one call; a single segment as a batch of one.

    Args:
        interface: from `find_interface`.
        device: where the trials run.
        dtype: of the calls and trials.
        head_dim: likewise.
    """

    name = "flash4"

    def __init__(
        self, interface: Interface, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> None:
        self.interface = interface
        self._like = {"device": device, "dtype": dtype}
        self._head_dim = head_dim
        self._verdicts: dict[tuple[bool, bool, int], str | None] = {}

    def why_not(self, segments: Segments, group: int) -> str | None:
        """Say why this call is not for flash-attn-4, or None if it is.

        The first call of a kind (one segment or several, causal or full, query heads a key head)
        compiles its kernels, some ten seconds, and tries them.
        """
        if not segments.num_scores:
            return "there is nothing to compute"
        if segments.has_empty_keys and any(q and not k for (q, k), _ in segments.shapes):
            return "some queries have no keys"
        kind = (len(segments) == 1, segments.causal, group)
        if kind not in self._verdicts:
            self._verdicts[kind] = self._trial(*kind)
        return self._verdicts[kind]

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        batch, packed = self._form(segments, q_LHD.device)
        out, lse, *_ = self.interface.forward(
            *(batch(x) for x in (q_LHD, k_LKD, v_LKD)),
            softmax_scale=softmax_scale,
            causal=segments.causal,
            return_lse=True,
            **packed,
        )
        return (out, lse) if packed else (out[0], lse[0])

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`; not for deterministic calls."""
        assert not deterministic, "flash-attn-4 adds up query gradients in any order"
        s = saved
        batch, packed = self._form(segments, s.q.device)
        dq, dk, dv = self.interface.backward(
            *(batch(x) for x in (s.q, s.k, s.v, s.out, s.dout, s.lse)),
            softmax_scale=softmax_scale,
            causal=segments.causal,
            **packed,
        )
        return (dq, dk, dv) if packed else (dq[0], dk[0], dv[0])

    @staticmethod
    def _form(
        segments: Segments, device: torch.device
    ) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
        """How tensors are handed over, and what is said of segments beside."""
        if len(segments) == 1:
            return lambda x: x.contiguous()[None], {}
        cu_q, cu_k = segments.cu_seqlens(device)
        max_q, max_k = segments.max_seqlens
        return lambda x: x.contiguous(), {
            "cu_seqlens_q": cu_q,
            "cu_seqlens_k": cu_k,
            "max_seqlen_q": max_q,
            "max_seqlen_k": max_k,
        }

    def _trial(self, single: bool, causal: bool, group: int) -> str | None:
        """Forward, and backward for an out and lse from elsewhere, against plain torch."""
        cu_q = (0, 331) if single else (0, 130, 130, 131, 331)
        cu_k = cu_q if causal else tuple(2 * end for end in cu_q)
        segments, scale = Segments(cu_q, cu_k, causal), self._head_dim**-0.5
        gen = torch.Generator(self._like["device"]).manual_seed(0)  # type: ignore[arg-type]

        def random(length: int, heads: int) -> Tensor:
            shape = (length, heads, self._head_dim)
            return torch.randn(shape, generator=gen, **self._like)  # type: ignore[call-overload]

        q, k, v = random(cu_q[-1], 2 * group), random(cu_k[-1], 2), random(cu_k[-1], 2)
        try:
            out, lse = self.forward(q, k, v, segments, scale)
            elsewhere = Saved(random(*q.shape[:2]), q, k, v, random(*q.shape[:2]), lse + 0.5)
            got = (out, lse, *self.backward(elsewhere, segments, scale, False))
            want = _expected(elsewhere, segments, scale)
        except Exception as problem:  # whatever its compiler or its assertions raise
            return f"flash-attn-4 failed its trial ({type(problem).__name__}: {problem})"
        names = ("out", "lse", "dq", "dk", "dv")
        for name, a, b in zip(names, got, want, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            if not error <= TRIAL_BOUND:
                return f"flash-attn-4 failed its trial: {name} is off by {error:.1e}"
        return None


def _expected(saved: Saved, segments: Segments, scale: float) -> tuple[Tensor, ...]:
    """Results of these segments and the gradients for the out and lse that `saved` has."""
    wide = Saved(*(x.double() for x in vars(saved).values()))
    parts = []
    for q, k in segments:
        s = wide.segment(q, k)
        size = (len(s.q), len(s.k))
        allowed = torch.ones(size, dtype=torch.bool, device=s.q.device).tril()
        mask = allowed if segments.causal else None
        out, lse = reference.attention_forward(s.q, s.k, s.v, mask, scale)
        grads = reference.attention_backward(s.dout, s.q, s.k, s.v, s.out, s.lse, mask, scale)
        parts.append((out, lse.t(), *grads))
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return joined[0], joined[1].t(), *joined[2:]


def refuse(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why flash-attn-4 takes no call of this kind of tensors, or None."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "pays from compute capability 9.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if head_dim > 128 or head_dim % 8:
        return f"takes head dimensions up to 128 in eights, not {head_dim}"
    found = find_interface()
    return found if isinstance(found, str) else None
