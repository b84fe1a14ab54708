"""Kernels that the benchmark times: ours and those of others, where they are importable.

flash-attn-4 is a wheel; DKernel is a folder of github.com/linxihui/dkernel, to be put on the path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_bench.cases import Case
from torch import Tensor

from dist_attn_kernels.block_sparse import block_sparse_backward, block_sparse_forward
from dist_attn_kernels.dense import Flash4Backend, FlashBackend, Saved, Segments
from dist_attn_kernels.dense_flash4 import Interface, find_interface
from dist_attn_kernels.lists import BLOCK, FULL, INTERVAL, Tiles, build_lists

Peer = Callable[[Tiles, list[Tensor], Case], tuple[Callable[[], Any], Callable[[], Any]]]


def ours(backend: str) -> Peer:
    """Our kernels by backend; the second function returns all results for the check."""

    def prepare(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
        q, k, v, dout = inputs
        lists = build_lists(tiles)
        how: Any = {"backend": backend}
        out, lse = block_sparse_forward(q, k, v, lists, **how)
        return (
            lambda: block_sparse_forward(q, k, v, lists, **how),
            lambda: block_sparse_backward(dout, (q, k, v), out, lse, lists, **how),
        )

    return prepare


def block_counts(
    tiles: Tiles, block: int, by_key: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Counts and indices of the partial and of the full blocks of every row (or column)."""
    ratio, num = block // BLOCK, -(-tiles.q_len // block)
    grids = []
    for kind in (INTERVAL, FULL):
        grid = torch.zeros(tiles.num_mask_heads, num, num, dtype=torch.int16, device="cuda")
        chosen = tiles.kinds == kind
        at = (tiles.heads[chosen], tiles.q_blocks[chosen] // ratio, tiles.k_blocks[chosen] // ratio)
        grid.index_put_(at, torch.ones_like(at[0], dtype=torch.int16), accumulate=True)
        grids.append(grid.mT.contiguous() if by_key else grid)
    whole = grids[1] == ratio * ratio
    some = (grids[0] + grids[1] > 0) & ~whole
    parts = []
    for mask in (some, whole):
        order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
        parts.append([mask.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]])
    return parts[0], parts[1]


def batched(inputs: list[Tensor]) -> list[Tensor]:
    """[tokens, heads, dim] as views [1, heads, tokens, dim], queries, keys and values as leaves."""
    views = [t.transpose(0, 1).unsqueeze(0) for t in inputs]
    return [t.detach().requires_grad_() for t in views[:3]] + views[3:]


def flex(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
    """torch's FlexAttention, compiled, with the same blocks and the same rule inside partial."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v, dout = batched(inputs)
    assert tiles.intervals is not None
    low, high = tiles.intervals[0, 0], tiles.intervals[0, 1]
    some, whole = block_counts(tiles, case.block)

    def rule(b: Any, h: Any, q_at: Any, k_at: Any) -> Any:
        return (k_at >= low[q_at]) & (k_at < high[q_at])

    mask = BlockMask.from_kv_blocks(*some, *whole, BLOCK_SIZE=case.block, mask_mod=rule)
    run = torch.compile(flex_attention, dynamic=False)
    group = case.heads != case.kv_heads

    def call() -> Any:
        return run(q, k, v, block_mask=mask, enable_gqa=group)

    out = call()

    def backward() -> Any:
        grads = torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)
        return [g[0].transpose(0, 1) for g in grads]

    return lambda: (call().detach()[0].transpose(0, 1), None), backward


def sdpa(backend: str) -> Peer:
    """Dense causal attention of torch, a yardstick: it computes more scores than the mask keeps."""

    def prepare(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        which = SDPBackend.FLASH_ATTENTION if backend == "fa2" else SDPBackend.CUDNN_ATTENTION
        q, k, v, dout = batched(inputs)

        def forward() -> Any:
            with sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
                )

        out = forward()
        return forward, lambda: torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)

    return prepare


def packed(backend: str) -> Peer:
    """Dense backends for masks of causal documents: torch's packed flash, or flash-attn-4."""

    def prepare(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
        q, k, v, dout = inputs
        segments = Segments(cu := documents(tiles), cu, True)
        scale = q.shape[2] ** -0.5
        flash: Any = FlashBackend()
        if backend == "flash4":
            flash = Flash4Backend(flash4(), q.device, q.dtype, q.shape[2])
            reason = flash.why_not(segments, q.shape[1] // k.shape[1])
            if reason is not None:
                raise ValueError(reason)
        out, lse = flash.forward(q, k, v, segments, scale)
        saved = Saved(dout, q, k, v, out, lse)
        return (
            lambda: flash.forward(q, k, v, segments, scale),
            lambda: flash.backward(saved, segments, scale, False),
        )

    return prepare


def flash4() -> Interface:
    """flash-attn-4's functions."""
    found = find_interface()
    if isinstance(found, str):
        raise ValueError(found)
    return found


def check_causal(tiles: Tiles) -> None:
    """Refuse masks that are more than causal inside their blocks."""
    assert tiles.intervals is not None
    low, high = tiles.intervals[0, :2].cpu()
    if low.any() or not torch.equal(high, torch.arange(1, tiles.q_len + 1, dtype=high.dtype)):
        raise ValueError("this peer's rule inside partial blocks is causal only")


def flash4_blocks(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
    """flash-attn-4 on blocks of 128, for masks that are causal inside partial blocks."""
    interface = flash4()
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from kernel_bench.causal_rule import causal_rule

    check_causal(tiles)
    size = (128, 128)
    by_query, by_key = (
        BlockSparseTensorsTorch(*some, *whole, block_size=size)
        for some, whole in (block_counts(tiles, 128, by_key) for by_key in (False, True))
    )
    q, k, v, dout = (t[None] for t in inputs)
    names = {"softmax_scale": q.shape[3] ** -0.5, "mask_mod": causal_rule}

    def forward() -> Any:
        out, lse, *_ = interface.forward(
            q, k, v, block_sparse_tensors=by_query, return_lse=True, **names
        )
        return out[0], lse[0]

    out, lse = (t[None] for t in forward())

    def backward() -> Any:
        grads = interface.backward(q, k, v, out, dout, lse, block_sparse_tensors=by_key, **names)
        return [g[0] for g in grads]

    return forward, backward


def dkernel(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
    """S2-Attention's own kernels (github.com/linxihui/dkernel), on blocks of 64."""
    from dkernel import SparseAttention

    check_causal(tiles)
    num = -(-tiles.q_len // BLOCK)
    pattern = torch.zeros(case.heads, num, num, dtype=torch.uint8, device="cuda")
    pattern[tiles.heads, tiles.q_blocks, tiles.k_blocks] = 1
    attention = SparseAttention(BLOCK, pattern, seq_dim=1).to("cuda")
    q, k, v = (t[None].detach().requires_grad_() for t in inputs[:3])
    dout = inputs[3][None]
    out = attention(q, k, v)

    def backward() -> Any:
        grads = torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)
        return [g[0] for g in grads]

    return lambda: (attention(q, k, v).detach()[0], None), backward


def documents(tiles: Tiles) -> tuple[int, ...]:
    """Boundaries of the causal documents that a mask consists of."""
    assert tiles.intervals is not None
    low, high = tiles.intervals[0, :2].cpu()
    if not torch.equal(high, torch.arange(1, tiles.q_len + 1, dtype=high.dtype)):
        raise ValueError("packed flash attention takes masks of causal documents only")
    return (*torch.unique(low).tolist(), tiles.q_len)


PEERS: dict[str, Peer] = {
    "hopper": ours("hopper"),
    "triton": ours("triton"),
    "flex": flex,
    "fa2-packed": packed("fa2"),
    "dkernel": dkernel,
    "flash4-packed": packed("flash4"),
    "flash4-blocks": flash4_blocks,
    "fa2-dense": sdpa("fa2"),
    "cudnn-dense": sdpa("cudnn"),
}
