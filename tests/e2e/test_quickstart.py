"""The quickstart: it learns, its plans vary, and one process computes the same curve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_attn.training.run_folder import read_metrics
from tests.e2e.command import QUICKSTART, finish, losses, start
from tests.faults import training
from tests.ranks import run_ranks

#: Many times what it takes: a machine that does other things as well is no failure.
LONGEST_S = 500.0
pytestmark = pytest.mark.timeout(2 * LONGEST_S)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The quickstart on four ranks, and beside it one process that holds every document whole.

    The four are the command itself; the one does the same without a launcher.
    """
    folder = tmp_path_factory.mktemp("quickstart")
    cache = f"data.cache_dir={folder / 'cache'}"
    four, one = folder / "four", folder / "one"
    command = start("train", "--cfg", QUICKSTART, "--set", f"run.dir={four}", "--set", cache)
    alone = [
        f"run.dir={one}", f"data.cache_dir={folder / 'cache-one'}", "engine.zero_stage=0",
        "planner.max_tokens_per_device=null", "logging.tensorboard=false",
        "checkpoint={every_steps: 0, at_end: false}",
    ]  # fmt: skip
    try:
        assert run_ranks(training, 1, str(QUICKSTART), alone, timeout_s=LONGEST_S) == ["done"]
    finally:
        done = finish(command, LONGEST_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return four, one, done.stdout


def test_the_curve_is_that_of_one_process_and_falls(runs: tuple[Path, Path, str]) -> None:
    four, one = losses(runs[0]), losses(runs[1])
    assert len(four) == len(one) == 60
    assert max(abs(a - b) for a, b in zip(four, one, strict=True)) <= 1e-3
    assert four[-1] <= four[0] * 2 / 3
    # The control: neighbouring steps differ by far more, so that a shifted curve would be seen.
    assert max(abs(a - b) for a, b in zip(four[1:], one[:-1], strict=True)) > 0.05


def test_degrees_differ_within_a_step_and_between_steps(runs: tuple[Path, Path, str]) -> None:
    groups = [line["groups"] for line in read_metrics(runs[0] / "metrics.jsonl")]
    degrees = [set(re.findall(r"(?:^|[+( x])(\d+)(?=[ru+ )|]|$)", g)) for g in groups]
    assert len(set(groups)) > 5
    assert any(len(d) > 1 for d in degrees)
    assert any(d != degrees[0] for d in degrees)
    assert all(g in runs[2] for g in groups)


def test_what_is_recorded(runs: tuple[Path, Path, str]) -> None:
    folder = runs[0]
    lines = read_metrics(folder / "metrics.jsonl")
    assert all(line["imbalance"] >= 1.0 and 0 <= line["padding_share"] < 1 for line in lines)
    assert all(line["predicted_s"] > 0 and line["memory_gib"] > 0 for line in lines)
    assert (folder / "config.yaml").is_file()
    assert len(list((folder / "plans").glob("step-*.json"))) == 60
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step-000040",
        "step-000060",
    ]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss", "train/tokens_per_s", "time/step_predicted_s", "time/step_measured_s",
        "balance/imbalance", "balance/padding_share", "memory/peak_gib", "time/plan_wait_s",
    } <= set(tags["scalars"])  # fmt: skip
    assert len(events.Images("plan/timeline")) == 6
    assert len(events.Scalars("train/loss")) == 60
