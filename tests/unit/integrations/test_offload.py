"""Saved tensors on the host: what is kept, what comes back, and in which order."""

from __future__ import annotations

import pytest
import torch

from dist_attn.config import Config, ModelConfig
from dist_attn.integrations.hf import build_model
from dist_attn.integrations.offload import HostOffload
from tests.unit.test_hf import LENGTHS, context_of, packed


def test_inputs_of_layers_are_kept_elsewhere_and_numbers_stay() -> None:
    ids, labels, positions = packed(LENGTHS)
    gradients, moved = [], []
    for offload in (False, True):
        config = ModelConfig(
            dtype="fp32", gradient_checkpointing=True, offload_checkpoints=offload, num_layers=3
        )
        model = build_model(config, 53, seed=1)
        loss = model(ids, labels, positions, context_of(LENGTHS))
        recompute = model.model.layers[0]._gradient_checkpointing_func.__self__
        assert isinstance(recompute.offload, HostOffload) == offload
        if offload:
            moved.append(recompute.offload.num_moved)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert moved == [3]
    # The last layer's is wanted at once; the others are on their way before they are wanted.
    assert recompute.offload.num_prefetched == 2


def test_what_comes_back_is_what_was_saved() -> None:
    """A copy: writing over the original after it was saved changes nothing that comes back."""
    x = torch.randn(5, requires_grad=True)
    y = x * 2
    offload = HostOffload()
    with offload.keeping():
        z = y * y
    y.data.zero_()
    z.sum().backward()
    assert torch.allclose(x.grad, 8 * x.detach())
    assert offload.num_moved == 2


def test_offload_without_checkpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="set both, or neither"):
        Config(model={"offload_checkpoints": True})
