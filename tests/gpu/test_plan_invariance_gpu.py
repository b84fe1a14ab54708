"""The invariant on a GPU in bf16: ranks share it; one process on the CPU in float32 is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.test_plan_invariance import (
    BF16_GRADIENT_TOLERANCE,
    BF16_LOSS_TOLERANCE,
    reference,
    run_plans,
)
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(cache: str) -> tuple[float, dict[str, Tensor]]:
    return run_ranks(reference, 1, cache)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plans_agree(cache: str, expected: tuple[float, dict[str, Tensor]], stage: int) -> None:
    cases = [(name, s) for name in ("2+1+1", "4 | 2+2 | 1") for s in ("ring", "ulysses")]
    found = run_ranks(
        run_plans, 4, cache, stage, [*cases, ("control", "ring")], expected, 1, "cuda:0", "bf16",
        timeout_s=200,
    )  # fmt: skip
    for by_case in found:
        control = by_case.pop(("control", "ring"))
        for case, (loss_error, gradient_error) in by_case.items():
            assert loss_error <= BF16_LOSS_TOLERANCE, case
            assert gradient_error <= BF16_GRADIENT_TOLERANCE, case
        assert control[0] > 5 * BF16_LOSS_TOLERANCE
