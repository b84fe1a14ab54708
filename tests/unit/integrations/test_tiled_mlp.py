"""The MLP in tiles: torch's own numbers, and no intermediate tensor of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.hf import build_model
from dist_attn.integrations.tiled_mlp import silu_gate, tile_mlps, tiled_mlp
from tests.unit.test_hf import context_of

HIDDEN, INNER = 12, 40


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = ((1, tokens, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def plain(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return silu_gate(hidden @ gate.T, hidden @ up.T) @ down.T


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "tile"), [(37, 8), (37, 64), (1, 1)])
def test_against_no_tiles(tokens: int, tile: int, dtype: torch.dtype) -> None:
    exact = run(plain, [t.double() for t in inputs(tokens, dtype)])
    whole = run(plain, inputs(tokens, dtype))
    tiled = run(lambda *t: tiled_mlp(*t, tile_tokens=tile), inputs(tokens, dtype))
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    for mine, torchs, right in zip(tiled, whole, exact, strict=True):
        assert mine.dtype == torchs.dtype
        error = (mine.double() - right).abs().max()
        allowed = 2 * (torchs.double() - right).abs().max() + slack * right.abs().max()
        assert error <= allowed
    if tokens > tile:  # The control: without its last tile a sum is far outside.
        part = run(plain, [t[:, :32] if t.dim() == 3 else t for t in inputs(tokens, dtype)])
        assert (part[2].double() - exact[2]).abs().max() > 0.01 * exact[2].abs().max()


class Largest(TorchDispatchMode):
    """The most elements of any result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_tensor_of_all_tokens_and_the_intermediate_size() -> None:
    sizes = []
    for function in (plain, lambda *t: tiled_mlp(*t, tile_tokens=16)):
        with Largest() as seen:
            run(function, inputs(512, torch.float32))
        sizes.append(seen.numel)
    assert sizes[0] >= 512 * INNER
    assert sizes[1] <= 512 * HIDDEN


def test_in_a_model() -> None:
    gradients = []
    ids = torch.arange(50)[None]
    tiles = {"mlp_tile_tokens": 7}
    for change in ({}, tiles, {**tiles, "gradient_checkpointing": True}):
        model = build_model(ModelConfig(dtype="fp32", **change), 53, seed=1)
        model(ids, ids, ids, context_of((50,))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_refused() -> None:
    model = build_model(ModelConfig(dtype="fp32"), 53, seed=1)
    model.model.layers[0].mlp.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="gated by 'gelu'; leave mlp_tile_tokens out"):
        tile_mlps(model.model, 8)
