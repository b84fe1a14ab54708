"""Which rank is called slow, from made-up times."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

from dist_attn.training.slow_ranks import SlowRanks, Work

NODES = ("n1", "n1", "n2", "n2")


def steps(
    count: int, slow: Callable[[int, int], float], seed: int = 0, noise: float = 0.1
) -> list[list[Work]]:
    """Unequal shares of unequal micro-batches: 5 ms each and a rate that the plan has wrong."""
    draw = np.random.default_rng(seed)
    works = []
    for step in range(count):
        row = []
        for rank in range(len(NODES)):
            planned, micro_batches = draw.uniform(0.001, 0.1), int(draw.integers(1, 4))
            fair = 0.005 * micro_batches + 3.0 * planned
            seconds = fair * slow(step, rank) * draw.uniform(1 - noise, 1 + noise)
            row.append(Work(seconds, planned, micro_batches))
        works.append(row)
    return works


def warnings(
    caplog: pytest.LogCaptureFixture, works: list[list[Work]]
) -> tuple[list[str], list[tuple[int, float]]]:
    watch = SlowRanks(1.5, 5, NODES, speaks=True)
    with caplog.at_level(logging.WARNING):
        found = [watch.judge(step, row) for step, row in enumerate(works)]
    return [r.getMessage() for r in caplog.records], found


def test_equal_ranks_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    texts, found = warnings(caplog, steps(60, lambda step, rank: 1.0))
    assert texts == []
    assert max(ratio for _, ratio in found[2:]) < 1.5


def test_a_slow_rank_is_named_once_and_once_when_it_recovers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts, found = warnings(
        caplog, steps(60, lambda step, rank: 2.5 if rank == 2 and 20 <= step < 40 else 1.0)
    )
    assert len(texts) == 2
    assert "step 24: rank 2 on n2 is slow" in texts[0]
    assert "step 44: rank 2 on n2 is as quick as the others again" in texts[1]
    assert all(rank == 2 and 1.8 < ratio < 3.5 for rank, ratio in found[20:40])


def test_a_few_slow_steps_are_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    texts, _ = warnings(caplog, steps(60, lambda step, rank: 3.0 if step % 5 and rank == 1 else 1))
    assert texts == []


def test_two_of_four_are_named(caplog: pytest.LogCaptureFixture) -> None:
    texts, _ = warnings(caplog, steps(12, lambda step, rank: 2.5 if rank >= 2 else 1.0))
    assert sorted(t.split(" is slow")[0][-12:] for t in texts) == ["rank 2 on n2", "rank 3 on n2"]


def test_ranks_without_work_are_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    idle = Work(0.0, 0.0, 0)
    works = [[row[0], idle, idle, idle] for row in steps(10, lambda step, rank: 9.0)]
    texts, found = warnings(caplog, works)
    assert texts == []
    assert found == [(0, 1.0)] * 10
    # Steps in which a rank idles neither count nor break its row.
    works = steps(10, lambda step, rank: 3.0 if rank == 3 else 1.0)
    works = [row if step % 2 else [*row[:3], idle] for step, row in enumerate(works)]
    assert "step 9: rank 3 on n2 is slow" in warnings(caplog, works)[0][0]
