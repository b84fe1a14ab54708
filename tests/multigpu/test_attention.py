"""Attention over NCCL, one GPU per rank."""

import pytest
import torch

from tests.attention_cases import (
    Case,
    assert_as_good_as_torch,
    attend,
    dense_mask,
    mask_of,
    together,
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
def test_over_nccl(strategy, mask_name):
    short = mask_name != "causal documents"
    lengths = (SEQ_LEN,) if short else (2411, 3, 1600)
    case = Case(lengths, NUM_HEADS, 2, 64, torch.bfloat16)
    args = (case, mask_name, "zigzag", strategy, "cuda:own")
    parts = run_ranks(attend, min(NUM_GPUS, 4), *args, timeout_s=120)
    whole = together(parts, case)
    allowed = dense_mask(mask_of(mask_name, case), case).cuda()
    assert_as_good_as_torch(whole, case, allowed)
