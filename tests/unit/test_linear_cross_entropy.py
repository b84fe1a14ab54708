"""The chunked loss against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_attn_kernels.linear_cross_entropy import linear_cross_entropy


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 19, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(31, 19, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 31, (tokens,), generator=g)
    labels[::3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "chunk"), [(37, 8), (8, 8), (7, 100), (1, 1)])
def test_against_torch(tokens: int, chunk: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(tokens, dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    reference = 0.3 * F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    expected = gradients(reference, *exact)

    loss = 0.3 * linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    plain = 0.3 * F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    ours, torchs = gradients(loss, hidden, weight), gradients(plain, hidden, weight)
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    error = abs(loss.item() - reference.item())
    assert error <= 2 * abs(plain.item() - reference.item()) + slack * (1 + abs(reference.item()))
    for mine, torch_gradient, exact_gradient in zip(ours, torchs, expected, strict=True):
        allowed = 2 * (torch_gradient - exact_gradient).abs().max()
        assert (mine - exact_gradient).abs().max() <= allowed + slack
        if exact_gradient.abs().max() > 0:
            # The control: without the upstream scale the error is the gradient's own size.
            assert (mine / 0.3 - exact_gradient).abs().max() > 10 * (allowed + slack)


def test_without_a_valid_label_the_graph_stays() -> None:
    hidden, weight, labels = inputs(5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0
    for gradient in gradients(loss, hidden, weight):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_shapes_are_checked() -> None:
    hidden, weight, labels = inputs(5, torch.float32)
    with pytest.raises(ValueError, match=r"takes hidden \[L, C\]"):
        linear_cross_entropy(hidden, weight, labels[:-1])


def test_weights_of_tokens() -> None:
    hidden, weight, labels = inputs(37, torch.float64)
    weights = torch.linspace(0, 3, 37)
    by_token = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = (by_token * weights).sum()
    loss = linear_cross_entropy(hidden, weight, labels, weights_L=weights, chunk_tokens=8)
    torch.testing.assert_close(loss, expected)
    pairs = zip(*(gradients(x, hidden, weight) for x in (loss, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)
    even = linear_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert abs(even.item() - loss.item()) > 1
