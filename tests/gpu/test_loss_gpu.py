"""Liger's fused loss as the models use it: twice torch's error at the most, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_attn.config import ModelConfig
from dist_attn.integrations.loss import loss_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, HIDDEN, VOCAB = 1501, 256, 5003
#: What an engine multiplies the sum with: no power of two, as small as one over a step's tokens.
UPSTREAM = 0.37e-3


def results(loss: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss * UPSTREAM, (hidden, weight))
    return [loss.detach().double(), *(g.double() for g in found)]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """As torch does it: logits in the inputs' dtype, the loss in float32 or wider."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    by_token = F.cross_entropy(logits, labels, reduction="none")
    return (by_token if weights is None else by_token * weights).sum()


def distances(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_gradients(dtype: torch.dtype, weighted: bool) -> None:
    pytest.importorskip("liger_kernel")
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, HIDDEN, device="cuda", generator=g).mul(0.3).to(dtype).requires_grad_()
        for n in (TOKENS, VOCAB)
    )
    labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda", generator=g)
    labels[::5] = -100
    weights = None
    if weighted:  # three sources, whose documents lie among each other
        weights = torch.tensor([1.0, 0.3, 0.0], device="cuda")[torch.arange(TOKENS) // 40 % 3]
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = results(plain(*wide, labels, weights), *wide)
    torchs = distances(results(plain(hidden, weight, labels, weights), hidden, weight), exact)

    liger = loss_function(ModelConfig(loss="liger"))
    found = results(liger(hidden, weight, labels, weights), hidden, weight)
    slack = 1e-3 if dtype == torch.bfloat16 else 1e-5
    for error, allowed in zip(distances(found, exact), torchs, strict=True):
        assert error <= 2 * allowed + slack, (distances(found, exact), torchs)
    # Controls: without the scale from above, or without the weights, results are far outside.
    unscaled = [found[1] / UPSTREAM, found[2] / UPSTREAM]
    assert min(distances(unscaled, exact[1:])) > 100
    if weighted:
        even = results(liger(hidden, weight, labels, None), hidden, weight)
        assert min(distances(even, exact)) > 0.1


def test_nothing_to_predict() -> None:
    pytest.importorskip("liger_kernel")
    hidden = torch.randn(7, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(90, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((7,), -100, device="cuda")
    liger = loss_function(ModelConfig(loss="liger"))
    for tokens in (7, 0):
        loss = liger(hidden[:tokens], weight, labels[:tokens], None)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
