"""Packed segments on the block-sparse kernels for Hopper, as one call whatever the lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn_kernels.lists import BlockLists, build_lists
from dist_attn_kernels.rules import tiles_from_intervals
from dist_attn_kernels.segments import Saved, Segments


class ListsBackend:
    """The block-sparse kernels; lists are built once for a call's segments and kept with them."""

    name = "block_sparse"

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        from dist_attn_kernels.block_sparse import block_sparse_forward  # noqa: PLC0415 - triton

        lists = self.lists(segments, q_LHD.device)
        q, k, v = (rows_contiguous(x) for x in (q_LHD, k_LKD, v_LKD))
        return block_sparse_forward(q, k, v, lists, softmax_scale=softmax_scale)

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`; bit by bit the same, always."""
        from dist_attn_kernels.block_sparse import block_sparse_backward  # noqa: PLC0415 - triton

        lists = self.lists(segments, saved.q.device)
        q, k, v = (rows_contiguous(x) for x in (saved.q, saved.k, saved.v))
        return block_sparse_backward(
            saved.dout, (q, k, v), saved.out, saved.lse, lists, softmax_scale=softmax_scale
        )

    def lists(self, segments: Segments, device: torch.device) -> BlockLists:
        """The segments' lists on a device, made once."""
        kept = segments.kept
        key = ("lists", device)
        if key not in kept:
            tiles = tiles_from_intervals(key_intervals(segments, device), segments.cu_k[-1])
            kept[key] = build_lists(tiles)
        lists = kept[key]
        assert isinstance(lists, BlockLists)
        return lists


def key_intervals(segments: Segments, device: torch.device) -> Tensor:
    """Which keys each query sees, int32 [1, 2, queries]: lo <= key < hi."""
    cu_q, cu_k = (torch.tensor(cu, device=device) for cu in (segments.cu_q, segments.cu_k))
    of = torch.repeat_interleave(torch.diff(cu_q))
    low, high = cu_k[of], cu_k[of + 1]
    if segments.causal:
        high = low + torch.arange(of.numel(), device=device) - cu_q[of] + 1
    return torch.stack([low, high]).unsqueeze(0).to(torch.int32)


def rows_contiguous(x_LHD: Tensor) -> Tensor:
    """The tensor, copied unless its tokens lie as the block-sparse kernels take them."""
    token, head, element = x_LHD.stride()
    fits = element == 1 and head == x_LHD.shape[2] and token % 8 == 0 and x_LHD.data_ptr() % 16 == 0
    return x_LHD if fits else x_LHD.clone(memory_format=torch.contiguous_format)
