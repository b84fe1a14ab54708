"""Other implementations of distributed attention, where they are installed.

Each runs its own way of dealing out tokens, on torch's fastest kernels for its mask: cuDNN for one
document, packed flash attention for several.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

PEERS = ("torch context_parallel", "deepspeed ulysses")
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer as a function of [L, H, D] tensors.

    Attributes:
        call: the forward, differentiable.
        positions: stream positions of this rank's tokens.
        scope: what forward and backward run in.
    """

    call: Call
    positions: Tensor
    scope: Callable[[], contextlib.AbstractContextManager[None]]


def refuse(name: str, mask_name: str, num_kv_heads: int) -> str | None:
    """Say why a peer cannot run a case, or None."""
    if name == "torch context_parallel":
        return None if mask_name in ("causal", "full") else "it has no such mask"
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if num_kv_heads % dist.get_world_size():
        return "it needs key/value heads that divide"
    return None if mask_name in ("causal", "full", "documents") else "it has no such mask"


def prepare(name: str, mask_name: str, cu_seqlens: np.ndarray) -> Peer:
    """Set a peer up for a case."""
    if name == "torch context_parallel":
        return _context_parallel(mask_name == "causal", int(cu_seqlens[-1]))
    return _deepspeed(mask_name, cu_seqlens)


def _context_parallel(causal: bool, seq_len: int) -> Peer:
    """Ring attention of torch.distributed, its load balancing as it comes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental

    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cuda", (size,))
    # It deals out a causal sequence in 2 * size pieces, as zigzag; a full one in sequence.
    if causal:
        pieces = torch.arange(seq_len, device="cuda").chunk(2 * size)
        positions = torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])
    else:
        positions = torch.arange(seq_len, device="cuda").chunk(size)[rank]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        # It wants to deal out something itself.
        dealt = torch.zeros(2 * size, device="cuda")
        parallel = experimental.context_parallel(mesh, buffers=[dealt], buffer_seq_dims=[0])
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), parallel:
            yield

    return Peer(call, positions, scope)


def _deepspeed(mask_name: str, cu_seqlens: np.ndarray) -> Peer:
    """Ulysses by DeepSpeed's DistributedAttention."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention
    from torch.nn.attention.varlen import varlen_attn

    deepspeed.comm.init_distributed("nccl", verbose=False)
    size, rank = dist.get_world_size(), dist.get_rank()
    positions = torch.arange(int(cu_seqlens[-1]), device="cuda").chunk(size)[rank]
    cu = torch.from_numpy(cu_seqlens.astype(np.int32)).cuda()
    longest = int(np.diff(cu_seqlens).max())

    parameters = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}

    def packed(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (x[0] for x in (q, k, v))
        if mask_name != "documents":
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=mask_name == "causal", enable_gqa=q.shape[1] != k.shape[1]
                )
            return out.transpose(1, 2)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        return varlen_attn(q, k, v, cu, cu, longest, longest, **causal)[None]

    peer = DistributedAttention(packed, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q[None], k[None], v[None], 0)[0]

    return Peer(call, positions, contextlib.nullcontext)
