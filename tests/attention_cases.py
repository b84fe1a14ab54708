"""Attention cases for tests: documents, their tensors, and what attention should return."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_attn.attention import attention
from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup, GroupPool, two_level_sets
from dist_attn.layout import Layout, from_intervals, make_layout, shares_of_fractions
from dist_attn.masks import Causal, Documents, Full, Mask
from dist_attn.peer_memory import PeerMemory, why_no_peer_memory
from tests.mask_zoo import zoo

#: Ranks of a node in tests of strategies in two levels, by the number of ranks.
INNER_SIZE = {2: 1, 3: 3, 4: 2}
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """The shape of one attention call over a packed stream."""

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    scale_of_q: float = 1.0
    seed: int = 0

    @property
    def cu_seqlens(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def seq_len(self) -> int:
        return sum(self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v and dout of the whole stream, in the case's dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {
            "q": self.num_heads,
            "k": self.num_kv_heads,
            "v": self.num_kv_heads,
            "dout": self.num_heads,
        }
        made = {
            name: torch.randn(self.seq_len, heads, self.head_dim, generator=generator)
            for name, heads in shapes.items()
        }
        made["q"] *= self.scale_of_q
        return {name: x.to(self.dtype) for name, x in made.items()}


def dense_mask(mask: Mask, case: Case) -> Tensor:
    """bool [H, S, S]."""
    heads = [torch.from_numpy(mask.materialize(case.seq_len, h)) for h in range(case.num_heads)]
    return torch.stack(heads)


def exact(case: Case, allowed: Tensor) -> dict[str, Tensor]:
    """Output, lse and gradients in float64, written out, on the device of the mask."""
    x = {name: t.to(allowed.device, torch.float64) for name, t in case.tensors().items()}
    for name in "qkv":
        x[name].requires_grad_()
    repeats = case.num_heads // case.num_kv_heads
    q, k, v = (x[n].transpose(0, 1) for n in "qkv")
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = (q @ k.transpose(1, 2) * case.head_dim**-0.5).masked_fill(~allowed, float("-inf"))
    has_keys = allowed.any(-1, keepdim=True)
    p = torch.where(has_keys, scores.masked_fill(~has_keys, 0.0).softmax(-1), 0.0)
    out = (p @ v).transpose(0, 1)
    out.backward(x["dout"])
    grads = {f"d{n}": x[n].grad for n in "qkv"}
    lse = torch.where(has_keys[..., 0], scores.logsumexp(-1), float("-inf"))
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def plain_torch(case: Case, allowed: Tensor) -> dict[str, Tensor]:
    """What torch's own attention returns for the whole stream at the case's dtype."""
    x = {name: t.to(allowed.device) for name, t in case.tensors().items()}
    for name in "qkv":
        x[name].requires_grad_()
    q, k, v = (x[n].transpose(0, 1)[None] for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None], enable_gqa=True)
    out = out[0].transpose(0, 1).nan_to_num()
    out.backward(x["dout"])
    return {"out": out.detach(), **{f"d{n}": x[n].grad.nan_to_num() for n in "qkv"}}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    if want.numel() == 0:
        return 0.0
    return (
        (got.to(want.device, torch.float64) - want).abs().max() / want.abs().max().clamp_min(1e-30)
    ).item()


def assert_as_good_as_torch(got: dict[str, Tensor], case: Case, allowed: Tensor) -> None:
    """Every error is at most twice plain torch's, plus one rounding of the dtype."""
    want, plain = exact(case, allowed), plain_torch(case, allowed)
    rounding = torch.finfo(case.dtype).eps
    for name in NAMES:
        bound = 2 * error(plain[name], want[name]) + rounding
        found = error(got[name], want[name])
        assert found <= bound, f"{name}: error {found:.2e}, allowed {bound:.2e}"


@functools.cache  # idle threads of a hundred gloo groups take 7% of a core
def world_group(inner_size: int | None = None, device: str = "cpu") -> CommGroup:
    """All ranks, cut into nodes if asked.

    Each has a GPU of its own in `cuda:copies`, where GPUs copy to each other, and in `cuda:nccl`.
    """
    ranks = tuple(range(dist.get_world_size()))
    if device.startswith("cuda:"):
        torch.cuda.set_device(dist.get_rank())
        nccl = dist.new_group(list(ranks), backend="nccl")
        dist.all_reduce(torch.zeros(1, device="cuda"), group=nccl)
        peers = None
        if device == "cuda:copies":
            assert why_no_peer_memory(ranks, nccl) is None
            peers = PeerMemory(nccl)
        return CommGroup(ranks, dist.get_rank(), nccl, peers=peers)
    pool = GroupPool()
    if inner_size is not None:
        pool.ensure(two_level_sets(ranks, inner_size))
    return pool.get(ranks, inner_size)


def mask_of(name: str, case: Case) -> Mask:
    masks = {
        **zoo(),
        "full": Full(),
        "causal": Causal(),
        "documents": Documents(case.cu_seqlens),
        "causal documents": Causal() & Documents(case.cu_seqlens),
    }
    return masks[name]


def layout_of(kind: str, case: Case) -> Layout:
    cp_size = dist.get_world_size()
    if kind == "scattered":
        owner = np.random.default_rng(case.seed).integers(0, cp_size, case.seq_len)
        owner[owner == cp_size - 1] = 0  # the last rank holds nothing
        held = [np.flatnonzero(owner == r) for r in range(cp_size)]
        return from_intervals(case.seq_len, [np.stack([p, p + 1], 1) for p in held])
    if kind == "placed":
        weights = np.random.default_rng(case.seed).integers(0, 3, (len(case.lengths), cp_size))
        shares = shares_of_fractions(case.lengths, weights + (weights.sum(1) == 0)[:, None])
        return make_layout(kind, case.cu_seqlens, cp_size, shares=shares)
    return make_layout(kind, case.cu_seqlens, cp_size)


def attend(
    case: Case, mask_name: str, layout_kind: str, strategy: str, device: str = "cpu", **kwargs: Any
) -> dict[str, Any]:
    """One rank's part of out, lse and gradients, with its positions and what it has sent."""
    two_levels = "+" in strategy and dist.get_world_size() > 1
    group = kwargs.pop("group", None)
    inner_size = kwargs.pop("inner_size", None) or INNER_SIZE.get(dist.get_world_size())
    if group is None:
        group = world_group(inner_size if two_levels else None, device)
    layout, ledger = layout_of(layout_kind, case), Ledger()
    positions = torch.from_numpy(layout.positions(group.cp_rank))
    x = {name: t[positions].to(device.partition(":")[0]) for name, t in case.tensors().items()}
    for name in "qkv":
        x[name].requires_grad_()
    out, lse = attention(
        x["q"], x["k"], x["v"], mask=mask_of(mask_name, case), layout=layout, group=group,
        strategy=strategy, return_lse=True, ledger=ledger, **kwargs,
    )  # fmt: skip
    forward = dict(ledger.sent_bytes)
    out.backward(x["dout"])
    return {
        "positions": positions,
        "out": out.detach().cpu(),
        "lse": lse.t().cpu(),
        **{f"d{n}": x[n].grad.cpu() for n in "qkv"},
        "calls": dict(ledger.calls),
        "forward_bytes": forward,
        "all_bytes": dict(ledger.sent_bytes),
    }


def together(parts: list[dict], case: Case) -> dict[str, Tensor]:
    """The whole stream from the ranks' parts; what no rank wrote stays NaN."""
    whole = {}
    for name in (*NAMES, "lse"):
        first = parts[0][name]
        whole[name] = first.new_full((case.seq_len, *first.shape[1:]), float("nan"))
        for part in parts:
            whole[name][part["positions"]] = part[name]
    return whole
