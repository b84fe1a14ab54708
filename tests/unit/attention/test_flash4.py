"""When flash-attn-4 is used: by what is installed, by the call, and by a trial."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dist_attn_kernels import dense, dense_cuda, dense_flash4, reference
from dist_attn_kernels.dense import CudaBackend, ReferenceBackend, Saved, Segments
from dist_attn_kernels.dense_flash4 import Flash4Backend, Interface, find_interface

NO_OTHERS = {"block_sparse": "not here", "cudnn": "not here"}
CPU = torch.device("cpu")


def segments_of(packed: dict[str, Any], num_q: int, num_k: int) -> Iterator[tuple[slice, slice]]:
    """What the boundaries say, after a look at the lengths that come with them."""
    if not packed:
        yield slice(0, num_q), slice(0, num_k)
        return
    q, k = (packed[f"cu_seqlens_{side}"].tolist() for side in "qk")
    assert packed["max_seqlen_q"] == max(b - a for a, b in itertools.pairwise(q))
    assert packed["max_seqlen_k"] == max(b - a for a, b in itertools.pairwise(k))
    for a, b in zip(itertools.pairwise(q), itertools.pairwise(k), strict=True):
        yield slice(*a), slice(*b)


def mask_of(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor | None:
    return torch.ones(len(q), len(k), dtype=torch.bool).tril() if causal else None


def fake_forward(*qkv: torch.Tensor, **names: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Plain torch in the shapes of flash-attn-4's forward."""
    scale, causal = names.pop("softmax_scale"), names.pop("causal")
    assert names.pop("return_lse")
    q, k, v = qkv if names else (x.squeeze(0) for x in qkv)
    outs, lses = [], []
    for a, b in segments_of(names, len(q), len(k)):
        mask = mask_of(q[a], k[b], causal)
        out, lse = reference.attention_forward(q[a], k[b], v[b], mask, scale)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse, None) if names else (out[None], lse[None], None)


def fake_backward(*saved: torch.Tensor, **names: Any) -> tuple[torch.Tensor, ...]:
    """The same of its backward."""
    scale, causal = names.pop("softmax_scale"), names.pop("causal")
    q, k, v, out, dout, lse = saved if names else (x.squeeze(0) for x in saved)
    parts = []
    for a, b in segments_of(names, len(q), len(k)):
        mask = mask_of(q[a], k[b], causal)
        args = (dout[a], q[a], k[b], v[b], out[a], lse[:, a], mask, scale)
        parts.append(reference.attention_backward(*args))
    grads = (torch.cat(column) for column in zip(*parts, strict=True))
    return tuple(g if names else g[None] for g in grads)


def deaf_backward(*saved: torch.Tensor, **names: Any) -> tuple[torch.Tensor, ...]:
    """A backward that computes the normaliser anew instead of taking the one it is given."""
    own = fake_forward(*saved[:3], return_lse=True, **names)[1]
    return fake_backward(*saved[:5], own, **names)


class Counted:
    """A function and how often it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **names: Any) -> Any:
        self.calls += 1
        return self.function(*args, **names)


def backend(backward: Callable[..., Any] = fake_backward) -> Flash4Backend:
    interface = Interface(Counted(fake_forward), Counted(backward))
    return Flash4Backend(interface, CPU, torch.float32, 8)


def tensors(cu: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.randn(cu[-1], 4, 8), torch.randn(cu[-1], 2, 8), torch.randn(cu[-1], 2, 8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cu", [(0, 50), (0, 7, 7, 8, 40)])
def test_it_takes_calls_there_and_back(cu, causal):
    flash4 = backend()
    cuda = CudaBackend(NO_OTHERS, flash4)
    cuda.flash = None
    segments, (q, k, v) = Segments(cu, cu, causal), tensors(cu)
    out, lse = cuda.forward(q, k, v, segments, 0.4)
    torch.testing.assert_close((out, lse), ReferenceBackend().forward(q, k, v, segments, 0.4))
    saved = Saved(torch.randn_like(out), q, k, v, torch.randn_like(out), lse + 1)
    got = cuda.backward(saved, segments, 0.4, False)
    want = ReferenceBackend().backward(saved, segments, 0.4, False)
    torch.testing.assert_close(got, want)
    # A trial and a call each.
    assert (flash4.interface.forward.calls, flash4.interface.backward.calls) == (2, 2)


def test_what_it_does_not_take():
    flash4 = backend()
    cuda = CudaBackend(NO_OTHERS, flash4)
    cuda.flash = ReferenceBackend()
    segments, (q, k, v) = Segments((0, 9), (0, 9), True), tensors((0, 9))
    out, lse = ReferenceBackend().forward(q, k, v, segments, 0.4)
    cuda.backward(Saved(out, q, k, v, out, lse), segments, 0.4, True)
    assert flash4.interface.backward.calls == 0
    holed = Segments((0, 4, 9), (0, 0, 9), False)
    assert "no keys" in cuda.why_not_flash4(holed, 2)
    cuda.forward(q, k, v, holed, 0.4)
    assert flash4.interface.forward.calls == 0


def test_a_flash_attention_that_the_user_activated_goes_first(monkeypatch):
    monkeypatch.setattr(dense_cuda, "active_flash", lambda: "FA3")
    cuda = CudaBackend(NO_OTHERS, backend())
    assert "the user put FA3" in cuda.why_not_flash4(Segments((0, 9), (0, 9), True), 2)


def broken(*args: Any, **names: Any) -> Any:
    raise AssertionError("Unsupported compute capability")


@pytest.mark.parametrize(
    ("backward", "says"),
    [(deaf_backward, "dq is off by"), (broken, "Unsupported compute capability")],
)
def test_a_failed_trial_is_the_reason(backward, says):
    """An lse of more keys must be taken as it is; the others then carry out the call."""
    flash4 = backend(backward)
    cuda = CudaBackend(NO_OTHERS, flash4)
    cuda.flash = ReferenceBackend()
    segments, (q, k, v) = Segments((0, 9), (0, 9), True), tensors((0, 9))
    for _ in range(2):
        torch.testing.assert_close(
            cuda.forward(q, k, v, segments, 0.4), cuda.flash.forward(q, k, v, segments, 0.4)
        )
    reason = cuda.why_not_flash4(segments, 2)
    assert says in reason
    assert "failed its trial" in reason
    assert flash4.interface.backward.calls == 1


@pytest.fixture
def _forget():
    find_interface.cache_clear()
    yield
    find_interface.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    module = types.ModuleType(dense_flash4.MODULE)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, dense_flash4.MODULE, module)


def stand_in(words: set[str]) -> Callable[..., None]:
    """A function that takes these parameters."""

    def function() -> None:
        raise AssertionError("only its signature is looked at")

    kind = inspect.Parameter.KEYWORD_ONLY
    named = [inspect.Parameter(word, kind) for word in sorted(words)]
    vars(function)["__signature__"] = inspect.Signature(named)
    return function


@pytest.mark.usefixtures("_forget")
def test_it_is_found_by_what_its_functions_take(monkeypatch):
    functions = {name: stand_in(words) for name, words in dense_flash4.NEEDED.items()}
    install(monkeypatch, **functions)
    assert find_interface() == Interface(*functions.values())
    find_interface.cache_clear()
    install(monkeypatch, _flash_attn_fwd=functions["_flash_attn_fwd"])
    assert find_interface() == "this flash-attn-4 has no _flash_attn_bwd"
    find_interface.cache_clear()
    without_lse = stand_in(dense_flash4.NEEDED["_flash_attn_bwd"] - {"lse", "out"})
    install(monkeypatch, **functions | {"_flash_attn_bwd": without_lse})
    assert find_interface() == "_flash_attn_bwd of this flash-attn-4 does not take lse, out"


@pytest.mark.usefixtures("_forget")
def test_absent_it_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, dense_flash4.MODULE, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    choice = dense._cuda_backend(torch.device("cuda"), torch.bfloat16, 128)
    assert "flash-attn-4 is not installed" in choice.refused["flash4"]
    segments = Segments((0, 9), (0, 9), True)
    assert "flash-attn-4 is not installed" in choice.why_not_flash4(segments, 1)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "says"),
    [
        ((8, 0), torch.bfloat16, 128, "compute capability 9.0"),
        ((9, 0), torch.float32, 128, "not torch.float32"),
        ((9, 0), torch.float16, 132, "not 132"),
    ],
)
def test_tensors_it_does_not_take(capability, dtype, head_dim, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert says in dense_flash4.refuse(torch.device("cuda"), dtype, head_dim)
