"""Liger's kernels in a model: twice torch's error at the most, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_attn.config import ModelConfig
from dist_attn.integrations.hf import build_model
from tests.unit.test_hf import context_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (300, 1, 211)


def gradients(device: str, dtype: torch.dtype, **more: Any) -> tuple[float, list[Tensor]]:
    config = ModelConfig(
        dtype="fp32", hidden_size=256, intermediate_size=640, num_heads=4, num_kv_heads=2, **more
    )
    model = build_model(config, 501, seed=1).to(device, dtype)
    ids = torch.randint(0, 501, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    loss = model(ids.to(device), ids.to(device), positions.to(device), context_of(LENGTHS))
    loss.backward()
    return loss.item(), [p.grad.double().cpu() for p in model.parameters()]


@pytest.mark.parametrize(
    "more",
    [{}, {"gradient_checkpointing": True}, {"mlp_tile_tokens": 100}, {"loss": "liger"}],
)
def test_fused_kernels_are_as_right_as_torch(more: dict[str, Any]) -> None:
    pytest.importorskip("liger_kernel")
    exact = gradients("cpu", torch.float64)
    plain = gradients("cuda", torch.bfloat16)
    fused = gradients("cuda", torch.bfloat16, kernels="liger", **more)
    assert abs(fused[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 1e-3 * exact[0]
    for mine, torchs, right in zip(fused[1], plain[1], exact[1], strict=True):
        error, allowed = ((g - right).norm() / right.norm() for g in (mine, torchs))
        assert error <= 2 * allowed + 1e-3
