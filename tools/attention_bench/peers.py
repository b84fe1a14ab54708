"""Other implementations of distributed attention: DeepSpeed's, ring-flash-attention's, yunchang's.

Each runs its own exchange and merging, on its own way of dealing out tokens, around the kernels of
`attention_bench.flash`. A mask that a peer says it takes is given to it the way it asks for it.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attention_bench.flash import stand_in
from attention_bench.report import NO_SUCH_MASK
from torch import Tensor

from dist_attn.attention import attention
from dist_attn.groups import single_rank_group
from dist_attn.layout import make_layout
from dist_attn.masks import Mask

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
RING = ("ring-flash-attn ring", "ring-flash-attn zigzag", "ring-flash-attn stripe")
PACKED = ("ring-flash-attn zigzag varlen", "ring-flash-attn llama3 varlen")
USP = ("yunchang usp", "yunchang usp zigzag")
PEERS = ("deepspeed ulysses", "deepspeed alst", *RING, *PACKED, *USP)


@dataclass(frozen=True)
class Case:
    """One mask of the benchmark, as peers are told of it.

    Attributes:
        name: the benchmark's name of it.
        mask: the mask.
        cu_seqlens: boundaries of its documents; one document where it has none.
        window: tokens before a query that it sees; -1: all.
        num_kv_heads: key/value heads.
    """

    name: str
    mask: Mask
    cu_seqlens: np.ndarray
    window: int
    num_kv_heads: int

    @property
    def seq_len(self) -> int:
        """Tokens of the stream."""
        return int(self.cu_seqlens[-1])


@dataclass(frozen=True)
class Peer:
    """A peer as a function of this rank's tokens.

    Attributes:
        call: the forward, differentiable.
        positions: stream positions of this rank's tokens, in the order that the peer keeps.
        note: what it does beside the task.
    """

    call: Call
    positions: Tensor
    note: str = ""


def refuse(name: str, case: Case) -> str:
    """Say why a peer does not take a case, or nothing."""
    missing = _missing(name)
    if missing:
        return missing
    size = dist.get_world_size()
    takes = {"causal", "window"} if name in (*RING, *USP) else {"causal", "window", "documents"}
    if name != "deepspeed ulysses" and case.name not in takes:
        return NO_SUCH_MASK
    parts = 2 * size if "zigzag" in name and name not in PACKED else size
    if name != PACKED[0] and case.seq_len % parts:
        return f"it needs a length that {parts} divides"
    return _refuse_heads(name, case, size)


def _refuse_heads(name: str, case: Case, size: int) -> str:
    heads = case.num_kv_heads
    if name == "deepspeed ulysses" and case.mask.pattern(0) != case.mask.pattern(1):
        return "it does not tell its attention which heads it holds"
    if name == "deepspeed ulysses" and heads < size:
        return "it needs a key/value head for every rank"
    if name == "deepspeed alst" and heads % size and size % heads:
        return "it needs key/value heads that divide the ranks, or ranks that divide them"
    degree = {"deepspeed ulysses": size, **dict.fromkeys(USP, _ulysses_degree(size))}.get(name, 1)
    return "it needs key/value heads that the ranks divide" if heads % degree else ""


def prepare(name: str, case: Case) -> Peer:
    """Set a peer up for a case. Collective: every rank."""
    if name == "deepspeed ulysses":
        return _deepspeed(case)
    if name == "deepspeed alst":
        return _alst(case)
    if name in RING:
        return _ring(name, case)
    if name in USP:
        return _usp(name, case)
    return _zigzag_varlen(case) if name == PACKED[0] else _llama3_varlen(case)


@functools.cache
def _missing(name: str) -> str:
    package = {"deepspeed": "deepspeed.sequence.layer", "yunchang": "yunchang"}
    module = package.get(name.split(maxsplit=1)[0], "ring_flash_attn")
    try:
        _import(module)
    except Exception as error:
        return f"it cannot be imported: {error}"
    return ""


@functools.cache
def _import(name: str) -> Any:
    if name == "ring_flash_attn":
        # Its adapter for transformers asks for names that transformers 5 has no more.
        adapters = types.ModuleType("ring_flash_attn.adapters")
        adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None  # type: ignore[attr-defined]
        sys.modules["ring_flash_attn.adapters"] = adapters
    with stand_in():
        return __import__(name, fromlist=["*"])


def _window(case: Case) -> tuple[int, int]:
    return (case.window, 0) if case.window >= 0 else (-1, -1)


def _batched(function: Callable[..., Tensor], **options: Any) -> Call:
    return lambda q, k, v: function(q[None], k[None], v[None], **options)[0]


def _dealt(kind: str, case: Case) -> Tensor:
    size, rank = dist.get_world_size(), dist.get_rank()
    layout = make_layout(kind, [0, case.seq_len], size)
    return torch.from_numpy(layout.positions(rank))


def _deepspeed(case: Case) -> Peer:
    """Ulysses around attention of the whole stream, which is ours: any mask."""
    from deepspeed.sequence.layer import DistributedAttention

    _meet_in_deepspeed()
    layout = make_layout("contiguous", [0, case.seq_len], 1)
    group = single_rank_group(dist.get_rank())

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        out = attention(
            q[0], k[0], v[0], mask=case.mask, layout=layout, group=group, strategy="local"
        )
        return out[None]

    peer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    call = _batched(peer, batch_dim_idx=0)
    note = "" if case.name == "causal" else "the mask is that of the attention it is given"
    return Peer(call, _dealt("contiguous", case), note)


def _alst(case: Case) -> Peer:
    """DeepSpeed's Ulysses for transformers, around its attention by torch, as a model calls it."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _meet_in_deepspeed()
    positions = _dealt("contiguous", case)
    start = np.repeat(case.cu_seqlens[:-1], np.diff(case.cu_seqlens))
    in_document = (positions - torch.from_numpy(start)[positions])[None]
    window = {"sliding_window": case.window + 1} if case.window >= 0 else {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = torch.nn.Module()
        layer.num_key_value_groups, layer.is_causal, layer.layer_idx = (
            q.shape[1] // k.shape[1],
            True,
            0,
        )
        peer = UlyssesSPAttentionHF(
            ALL_ATTENTION_FUNCTIONS["sdpa"], 1, q.shape[1], q.shape[2], k.shape[1], 1,
            dist.group.WORLD, local_seq_length=len(q), global_seq_length=case.seq_len,
        )  # fmt: skip
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, _ = peer(layer, q, k, v, None, position_ids=in_document.to(q.device), **window)
        return out[0].unflatten(-1, (q.shape[1], q.shape[3]))

    return Peer(call, positions, "told of documents and windows as by a model")


def _meet_in_deepspeed() -> None:
    import deepspeed

    # Else it compiles an operator for ranks that share memory, which takes longer than the rest.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", verbose=False)


def _ring(name: str, case: Case) -> Peer:
    kind = name.split()[1]
    peers = _import("ring_flash_attn")
    function = {
        "ring": "ring_flash_attn_func",
        "zigzag": "zigzag_ring_flash_attn_func",
        "stripe": "stripe_flash_attn_func",
    }[kind]
    layout = {"ring": "contiguous", "zigzag": "zigzag", "stripe": "striped"}[kind]
    options = {"causal": True, "window_size": _window(case), "group": dist.group.WORLD}
    return Peer(_batched(getattr(peers, function), **options), _dealt(layout, case))


def _ulysses_degree(size: int) -> int:
    # A ring of one sends to itself, which gloo does not do.
    return 2 if size % 4 == 0 else 1


def _usp(name: str, case: Case) -> Peer:
    """Ulysses over neighbours, a ring across, as our `ulysses+ring`."""
    yunchang = _import("yunchang")
    size, rank = dist.get_world_size(), dist.get_rank()
    ulysses = _ulysses_degree(size)
    ring = size // ulysses
    yunchang.set_seq_parallel_pg(ulysses, ring, rank, size)
    kind = "zigzag" if "zigzag" in name else "basic"
    stream = torch.arange(case.seq_len)[None, :, None]
    extract = yunchang.EXTRACT_FUNC_DICT[kind]
    positions = extract(stream, rank=rank, world_size=size, rd=ring, ud=ulysses).reshape(-1)
    kernels = __import__("yunchang.kernels", fromlist=["AttnType"])
    peer = yunchang.LongContextAttention(ring_impl_type=kind, attn_type=kernels.AttnType.FA)
    options = {"causal": True, "window_size": _window(case)}
    return Peer(_batched(peer, **options), positions)


def _zigzag_varlen(case: Case) -> Peer:
    """Each document is padded until 2 * ranks divide it, as the peer requires."""
    peers = _import("ring_flash_attn")
    size, rank = dist.get_world_size(), dist.get_rank()
    lengths = np.diff(case.cu_seqlens)
    padded = -(-lengths // (2 * size)) * (2 * size)
    starts = np.cumsum(padded) - padded
    real = np.full(int(padded.sum()), -1)
    for first, start, length in zip(case.cu_seqlens, starts, lengths, strict=False):
        real[start : start + length] = np.arange(first, first + length)
    layout = make_layout("zigzag", np.concatenate([[0], np.cumsum(padded)]), size)
    mine = real[layout.positions(rank)]
    slots = torch.from_numpy(np.flatnonzero(mine >= 0))
    positions = torch.from_numpy(mine[mine >= 0])
    local = np.concatenate([[0], np.cumsum(padded // size)])
    cu = torch.from_numpy(local.astype(np.int32))
    longest = int((padded // size).max())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where = slots.to(q.device)
        q, k, v = (
            x.new_zeros((len(mine), *x.shape[1:])).index_copy(0, where, x) for x in (q, k, v)
        )
        out = peers.zigzag_ring_flash_attn_varlen_func(
            q, k, v, cu.to(q.device), longest, causal=True, window_size=_window(case),
            group=dist.group.WORLD,
        )  # fmt: skip
        return out.index_select(0, where)

    more = padded.sum() / lengths.sum() - 1
    return Peer(call, positions, f"pads documents by {more:.1%} of the tokens" if more else "")


def _llama3_varlen(case: Case) -> Peer:
    """Gathers all keys and values, a head at a time."""
    peers = _import("ring_flash_attn")
    size, rank = dist.get_world_size(), dist.get_rank()
    cu = torch.from_numpy(np.unique(case.cu_seqlens).astype(np.int32))
    cu_q, cu_k, max_q, max_k, keys = peers.llama3_flash_attn_prepare_cu_seqlens(
        cu, True, rank, size
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peers.llama3_flash_attn_varlen_func(
            q, k, v, cu_q.to(q.device), cu_k.to(q.device), max_q, max_k, heads_k_stride=1,
            local_k_slice=keys, causal=True, window_size=_window(case), group=dist.group.WORLD,
        )  # fmt: skip

    return Peer(call, _dealt("contiguous", case))
