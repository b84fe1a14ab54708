"""From the arguments of an attention call to the strategy and the call that carry it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_attn.attention.context import KeptAttention
from dist_attn.attention.gather import Gather
from dist_attn.attention.ring import Ring
from dist_attn.attention.step import Kernel
from dist_attn.attention.strategy import Call, Local, Strategy
from dist_attn.attention.tile_step import why_not_block_sparse
from dist_attn.attention.two_level import TwoLevel
from dist_attn.attention.ulysses import Ulysses
from dist_attn.attention.workload import workload
from dist_attn.comm.ledger import Ledger
from dist_attn.errors import PlanError
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask, dense_form
from dist_attn_kernels.dense import choose_backend

STRATEGIES: dict[str, Strategy] = {
    "local": Local(),
    "ring": Ring(),
    "gather": Gather(),
    "ulysses": Ulysses(Local()),
    # Inside nodes + between them.
    "ring+ring": Ring(double=True),
    "ring+gather": TwoLevel(Ring(), "gather"),
    "ring+ulysses": Ulysses(Ring(), outside=True),
    "gather+ring": TwoLevel(Gather(), "ring"),
    "gather+gather": TwoLevel(Gather(), "gather"),
    "gather+ulysses": Ulysses(Gather(), outside=True),
    "ulysses+ring": Ulysses(Ring()),
    "ulysses+gather": Ulysses(Gather()),
    "ulysses+ulysses": Ulysses(Ulysses(Local(), max_chunks=1)),
}


@dataclass(frozen=True)
class Place:
    """Where and how attention is computed, as far as tensors have no say in it."""

    mask: Mask
    layout: Layout
    group: CommGroup
    deterministic: bool = False
    gradient_dtype: torch.dtype | None = None
    ledger: Ledger | None = None
    kept: KeptAttention | None = None


def choose_strategy(name: str, group: CommGroup) -> Strategy:
    """Return the strategy of a name; a group of one is always local.

    Raises:
        PlanError: no such strategy, or not for this group.
    """
    if name not in STRATEGIES:
        raise PlanError(f"unknown strategy '{name}'; known are {', '.join(STRATEGIES)}")
    if group.cp_size == 1:
        return STRATEGIES["local"]
    if name == "local":
        raise PlanError(f"strategy 'local' is for one rank, the group has {group.cp_size}")
    if ("+" in name) != (group.inner is not None):
        raise PlanError(
            f"strategy '{name}' and the group do not fit: a strategy in two levels, and only "
            f"that, takes a group with inner and outer ones, from GroupPool.get(ranks, inner_size)"
        )
    return STRATEGIES[name]


def make_call(
    q: Tensor, k: Tensor, v: Tensor, place: Place, softmax_scale: float | None = None
) -> Call:
    """Check the tensors and put together what a strategy needs beside them."""
    _check(q, k, v, place.layout, place.group)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    backend = choose_backend(q.device, q.dtype, q.shape[-1]).backend
    heads = tuple(range(q.shape[1]))
    work = workload(place.mask, place.layout, place.group.cp_rank, heads, k.shape[1])
    kernel = Kernel(backend, scale, place.deterministic)
    if place.gradient_dtype is not None and not place.gradient_dtype.is_floating_point:
        raise PlanError(f"gradient_dtype must be a floating-point type, got {place.gradient_dtype}")
    return Call(work, place.group, kernel, place.gradient_dtype, place.ledger, place.kept)


def explain_kernel(
    mask: Mask, seq_len: int, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str:
    """Say in one line which kernels compute a mask, and why others do not: for logs."""
    if dense_form(mask, seq_len) is not None:
        choice = choose_backend(device, dtype, head_dim)
        refused = [f"{name} {reason}" for name, reason in choice.refused.items()]
        among = getattr(choice.backend, "refused", {})
        refused += [f"in it {name} {reason}" for name, reason in among.items()]
        return f"dense kernels '{choice.backend.name}'" + _because(refused)
    reason = why_not_block_sparse(device, dtype, head_dim)
    if reason is None:
        return "block-sparse kernels; the dense ones take documents that are full or causal"
    return "plain torch operations on tiles, slow" + _because([f"block-sparse kernels {reason}"])


def _because(refused: list[str]) -> str:
    return f" ({'; '.join(refused)})" if refused else ""


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: CommGroup) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise PlanError(f"attention takes q [L, H, D] and k, v [L, K, D], got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise PlanError(f"query heads must be a multiple of key/value heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise PlanError(
            f"q, k and v must have one dtype and device, got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device}, {v.dtype} on {v.device}"
        )
    if layout.cp_size != group.cp_size:
        raise PlanError(f"the layout is for {layout.cp_size} ranks, the group has {group.cp_size}")
    local = layout.local_seq_len(group.cp_rank)
    if not q.shape[0] == k.shape[0] == local:
        raise PlanError(
            f"the layout gives {local} tokens to rank {group.cp_rank} of the group, got {shapes}"
        )
