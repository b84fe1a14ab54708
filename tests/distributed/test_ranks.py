"""The rank helper itself: values come back, failures end a test at once, a rank can be killed."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, kill_this_rank, run_ranks, run_ranks_to_the_end


def sum_of_ranks(start: int) -> float:
    x = torch.tensor([float(start + dist.get_rank())])
    dist.all_reduce(x)
    return x.item()


def process_id() -> int:
    return os.getpid()


def fail_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("as asked")
    time.sleep(30)


def kill_rank(rank: int) -> int:
    if dist.get_rank() == rank:
        kill_this_rank()
    return dist.get_rank()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_returns_its_value(world_size):
    total = float(sum(range(10, 10 + world_size)))
    assert run_ranks(sum_of_ranks, world_size, 10) == [total] * world_size


def test_processes_are_reused_unless_fresh():
    first = run_ranks(process_id, 2)
    assert run_ranks(process_id, 2) == first
    assert not set(run_ranks(process_id, 2, fresh=True)) & set(first)


def test_a_failing_rank_ends_the_test_at_once():
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 of 2(?s:.*)ArithmeticError: as asked"):
        run_ranks(fail_on_rank, 2, 1)
    assert time.monotonic() - start < 15
    assert run_ranks(sum_of_ranks, 2, 0) == [1.0, 1.0]


def test_running_out_of_time_is_a_failure():
    with pytest.raises(RankFailure, match="not done after"):
        run_ranks(fail_on_rank, 2, -1, timeout_s=0.5)


def test_a_dead_rank_is_a_failure():
    with pytest.raises(RankFailure, match="rank 0 died with exit code -9"):
        run_ranks(kill_rank, 2, 0)


def test_outcomes_tell_the_killed_rank_from_the_others():
    outcomes = run_ranks_to_the_end(kill_rank, 2, 1)
    assert outcomes[0].value == 0
    assert not outcomes[0].killed
    assert outcomes[1].killed
