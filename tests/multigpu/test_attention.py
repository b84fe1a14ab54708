"""Attention over one GPU per rank, by NCCL and by copies from GPU to GPU."""

import pytest
import torch

from tests.attention_cases import (
    Case,
    assert_as_good_as_torch,
    attend,
    dense_mask,
    mask_of,
    together,
    world_group,
)
from tests.mask_zoo import NUM_HEADS, SEQ_LEN
from tests.ranks import run_ranks

NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("mask_name", ["causal documents", "s2", "causal window"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("exchange", ["copies", "nccl"])
def test_over_gpus(exchange, strategy, mask_name):
    short = mask_name != "causal documents"
    lengths = (SEQ_LEN,) if short else (2411, 3, 1600)
    case = Case(lengths, 2 * NUM_HEADS if short else 16, NUM_HEADS, 64, torch.bfloat16)
    args = (attend_again, case, mask_name, "zigzag", strategy, f"cuda:{exchange}")
    parts = run_ranks(*args[:1], min(NUM_GPUS, 4), *args[1:], timeout_s=120)
    allowed = dense_mask(mask_of(mask_name, case), case).cuda()
    for repeat in zip(*parts, strict=True):
        assert_as_good_as_torch(together(list(repeat), case), case, allowed)


def attend_again(*args):
    """Three calls in one group, the later ones on memory that the earlier ones have used."""
    group = world_group(device=args[-1])
    return [attend(*args[:-1], device="cuda", group=group) for _ in range(3)]
