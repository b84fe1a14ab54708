"""A gated MLP that is computed a tile of tokens at a time, and again in its backward."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_attn.errors import ConfigError

#: From gate and up projection to their product.
Gate = Callable[[Tensor, Tensor], Tensor]


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """As Llama's MLP does it in torch."""
    return F.silu(gate) * up


def tiled_mlp(
    hidden_LC: Tensor,
    gate_IC: Tensor,
    up_IC: Tensor,
    down_CI: Tensor,
    *,
    tile_tokens: int,
    gate: Gate = silu_gate,
) -> Tensor:
    """`gate(hidden @ gate.T, hidden @ up.T) @ down.T`, so many tokens at a time.

    Of the intermediate tensors no more than a tile's ever exist, neither in the forward nor in the
    backward, which computes them again.

    Args:
        hidden_LC: [..., C].
        gate_IC: projection [I, C].
        up_IC: projection [I, C].
        down_CI: projection [C, I].
        tile_tokens: tokens of a tile.
        gate: the product of the two.

    Numerics: the same products in the same dtypes as without tiles; gradients of the projections
        add up over the tiles in float32 and are rounded once.
    """
    result: Tensor = _TiledMLP.apply(hidden_LC, gate_IC, up_IC, down_CI, tile_tokens, gate)
    return result


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor, tile: int, act: Gate
    ) -> Tensor:
        ctx.save_for_backward(hidden, gate, up, down)
        ctx.tile, ctx.act = tile, act
        out = torch.empty((*hidden.shape[:-1], down.shape[0]), dtype=hidden.dtype,
                          device=hidden.device)  # fmt: skip
        flat = out.view(-1, out.shape[-1])
        rows = hidden.reshape(-1, hidden.shape[-1])
        for x, y in zip(rows.split(tile), flat.split(tile), strict=True):
            torch.mm(act(x @ gate.T, x @ up.T), down.T, out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate, up, down = ctx.saved_tensors
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dgate, dup, ddown = (torch.zeros_like(w, dtype=wide) for w in (gate, up, down))
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        parts = (
            hidden.reshape(-1, hidden.shape[-1]),
            dout.reshape(-1, dout.shape[-1]),
            dhidden.view(-1, hidden.shape[-1]),
        )
        for x, dy, dx in zip(*(p.split(ctx.tile) for p in parts), strict=True):
            a, b = x @ gate.T, x @ up.T
            with torch.enable_grad():
                leaves = a.requires_grad_(), b.requires_grad_()
                product = ctx.act(*leaves)
            ddown += dy.T @ product.detach()
            da, db = torch.autograd.grad(product, leaves, dy @ down)
            dgate += da.T @ x
            dup += db.T @ x
            torch.add(da @ gate, db @ up, out=dx)
        grads = (dgate.to(gate.dtype), dup.to(up.dtype), ddown.to(down.dtype))
        return dhidden, *grads, None, None


def tile_mlps(decoder: nn.Module, tile_tokens: int, gate: Gate = silu_gate) -> None:
    """Let the MLPs of a Llama-type decoder be computed in tiles.

    Raises:
        ConfigError: they have biases or another activation.
    """
    for module in decoder.modules():
        if type(module).__name__.endswith("MLP"):
            _check(module)
            module.forward = MethodType(_forward(tile_tokens, gate), module)


def _forward(tile_tokens: int, gate: Gate) -> Callable[[Any, Tensor], Tensor]:
    def forward(module: Any, hidden: Tensor) -> Tensor:
        projections = (module.gate_proj, module.up_proj, module.down_proj)
        weights = (p.weight for p in projections)
        return tiled_mlp(hidden, *weights, tile_tokens=tile_tokens, gate=gate)

    return forward


def _check(module: Any) -> None:
    activation = module.config.hidden_act
    biased = any(p.bias is not None for p in (module.gate_proj, module.up_proj, module.down_proj))
    if biased or activation != "silu":
        what = "has biases" if biased else f"is gated by '{activation}'"
        raise ConfigError(
            f"model.mlp_tile_tokens takes MLPs without biases that are gated by silu; this one "
            f"{what}; leave mlp_tile_tokens out"
        )
