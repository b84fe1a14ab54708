"""Disks that are full or read-only, a planner that fails, a plan that differs, and long runs."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from dist_attn.groups import GroupPool
from dist_attn.planner import solver_process
from dist_attn.planner.plan import Plan
from dist_attn.training.run_folder import read_metrics
from tests.e2e.command import QUICKSTART, losses, small_config
from tests.faults import OVERRIDES, at_step, listening, training
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run on two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(training, 2, str(small_config(folder)), OVERRIDES) == ["done"] * 2
    return losses(folder / "run")


def training_on_a_small_disk(config: str, overrides: list[str], limited_rank: int) -> str:
    """Train where one rank cannot write files beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return training(config, overrides, "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limited_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(
    tmp_path: Path, limited_rank: int
) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    # So that the first three steps of nine are three steps.
    short, long = (
        [*OVERRIDES, "optimizer.schedule=constant", f"run.steps={steps}"] for steps in (3, 9)
    )
    assert run_ranks(training, 2, config, short) == ["done"] * 2
    ends = run_ranks(training_on_a_small_disk, 2, config, long, limited_rank)
    assert ends[0] == ends[1]
    assert "cannot write checkpoint" in ends[0]
    assert "earlier checkpoints are untouched" in ends[0]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000003"
    # What was half written does not go on filling the disk.
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000003"]
    assert len(read_metrics(run / "metrics.jsonl")) == 6
    assert run_ranks(training, 2, config, long, "latest") == ["done"] * 2
    assert run_ranks(training, 2, config, [*long, f"run.dir={tmp_path / 'whole'}"]) == ["done"] * 2
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_really_is_full(tmp_path: Path, curve: list[float]) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    run.mkdir()
    # Room for one checkpoint of 450 KB and what lies beside it.
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(run)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        ends = run_ranks(training, 2, config, OVERRIDES)
        assert ends[0] == ends[1]
        assert "cannot write checkpoint" in ends[0]
        assert "step-000006" in ends[0]
        assert "No space left on device" in ends[0]
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert names == ["latest", "step-000003"]
        subprocess.run(["mount", "-o", "remount,size=10m", str(run)], check=True)
        assert run_ranks(training, 2, config, OVERRIDES, "latest") == ["done"] * 2
        assert losses(run) == curve
    finally:
        subprocess.run(["umount", str(run)], check=True)


def training_until_nothing_can_be_recorded(config: str, overrides: list[str]) -> str:
    """Train; after four steps, rank 0's files may not grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (Path(config).parent / "run" / "metrics.jsonl").stat

    def limit() -> None:
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size().st_size + 10, before[1]))

    try:
        with at_step(4, limit):
            return training(config, overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_full_disk_that_the_metrics_meet_first(tmp_path: Path, curve: list[float]) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    ends = run_ranks(training_until_nothing_can_be_recorded, 2, config, OVERRIDES)
    assert ends[0] == ends[1]
    assert f"run.dir: cannot write {run}" in ends[0]
    assert "File too large" in ends[0]
    assert len(read_metrics(run / "metrics.jsonl")) == 3
    assert run_ranks(training, 2, config, OVERRIDES, "latest") == ["done"] * 2
    assert losses(run) == curve


def without_override() -> None:
    """Make file modes count in this thread also where it is root's: drop CAP_DAC_OVERRIDE."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    content = ctypes.create_string_buffer(24)
    assert libc.capget(header, content) == 0, os.strerror(ctypes.get_errno())
    effective, *rest = struct.unpack("<6I", content.raw)
    kept = effective & ~(1 << 1)  # CAP_DAC_OVERRIDE
    assert libc.capset(header, struct.pack("<6I", kept, *rest)) == 0


def training_into_a_read_only_folder(config: str, overrides: list[str]) -> str:
    """Train; after four steps, the folder of the checkpoints can be read but not written."""
    checkpoints = Path(config).parent / "run" / "checkpoints"

    def protect() -> None:
        without_override()
        dist.barrier()
        checkpoints.chmod(0o555)

    with at_step(5, protect):
        return training(config, overrides)


@pytest.mark.slow
def test_a_read_only_folder_ends_the_run_and_leaves_the_checkpoints_before(
    tmp_path: Path, curve: list[float]
) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    ends = run_ranks(training_into_a_read_only_folder, 2, config, OVERRIDES, fresh=True)
    assert ends[0] == ends[1]
    assert "cannot write checkpoint" in ends[0]
    assert "Permission denied" in ends[0]
    assert "step-000006" in ends[0]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000003"]
    (run / "checkpoints").chmod(0o755)
    assert run_ranks(training, 2, config, OVERRIDES, "latest") == ["done"] * 2
    assert losses(run) == curve


def training_while_the_planner_fails(config: str, overrides: list[str], number: int) -> str:
    """Train; rank 0's planner gets a signal in the fourth step."""

    def strike() -> None:
        for child in psutil.Process().children():
            if "dist_attn.planner.solver_process" in child.cmdline():
                child.send_signal(number)

    with at_step(4, strike), listening(solver_process.logger) as said:
        return " ".join([training(config, overrides), *said])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["crash", "hang"])
def test_a_planner_that_fails_once_changes_nothing(
    tmp_path: Path, number: int, curve: list[float]
) -> None:
    config = str(small_config(tmp_path))
    patient = [*OVERRIDES, "planner.give_up_s=4"]
    ends = run_ranks(training_while_the_planner_fails, 2, config, patient, number)
    assert ends[0].startswith("done the planner ")
    assert "it is started again" in ends[0]
    assert ends[1] == "done"
    assert losses(tmp_path / "run") == curve


def training_with_another_plan(config: str, overrides: list[str]) -> str:
    """Train; what rank 1 received as the plan of the fifth step is not what the others did."""
    digest = Plan.digest
    with pytest.MonkeyPatch.context() as patch:

        def changed(self: Plan) -> str:
            there = (Path(config).parent / "run" / "metrics.jsonl").read_text().count("\n")
            other = dist.get_rank() == 1 and there == 4
            return digest(replace(self, world_size=9) if other else self)

        patch.setattr(Plan, "digest", changed)
        return training(config, overrides)


@pytest.mark.slow
def test_a_rank_with_another_plan_is_named(tmp_path: Path) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    ends = run_ranks(training_with_another_plan, 3, config, OVERRIDES)
    assert ends[0] == ends[1] == ends[2]
    assert ends[0].startswith("step 4: rank 1 on n1 (")
    assert "another plan than the other ranks" in ends[0]
    assert len(read_metrics(run / "metrics.jsonl")) == 4
    assert run_ranks(training, 3, config, OVERRIDES, "latest") == ["done"] * 3
    whole = [*OVERRIDES, f"run.dir={tmp_path / 'whole'}"]
    assert run_ranks(training, 3, config, whole) == ["done"] * 3
    assert losses(run) == losses(tmp_path / "whole")


def training_and_counting(config: str, overrides: list[str], every: int) -> list[tuple[int, ...]]:
    """Train; memory in KiB, open files, threads and process groups every so many steps."""
    counts: list[tuple[int, ...]] = []
    process = psutil.Process()
    ensure = GroupPool.ensure

    def counted(self: GroupPool, sets: object) -> None:
        ensure(self, sets)  # type: ignore[arg-type]
        calls[0] += 1
        if calls[0] % every == 0:
            # Pictures leave cycles behind; what nobody holds is no growth.
            gc.collect()
            kib = process.memory_info().rss // 1024
            counts.append((kib, process.num_fds(), process.num_threads(), len(self)))

    calls = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupPool, "ensure", counted)
        assert training(config, overrides) == "done"
    return counts


#: The quickstart with documents and ranks of a quarter of its size.
QUARTER = [
    "run.steps=2000", "data.batch.tokens=2048", "data.max_document_tokens=1024",
    "planner.max_tokens_per_device=384", "planner.degrees=all", "checkpoint.every_steps=100",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_two_thousand_steps_of_the_quickstart_grow_nothing(tmp_path: Path) -> None:
    config, run, every = str(QUICKSTART), tmp_path / "run", 100
    here = [*QUARTER, f"run.dir={run}", f"data.cache_dir={tmp_path / 'cache'}"]
    ranks = run_ranks(training_and_counting, 4, config, here, every, fresh=True, timeout_s=5000)
    text = "KiB, open files, threads, groups; rank by rank\n" + "\n".join(map(str, ranks))
    (tmp_path / "counts.txt").write_text(text)
    # Plans of all degrees.
    kinds = {line["groups"] for line in read_metrics(run / "metrics.jsonl")}
    assert len(kinds) > 20
    for rank, counts in enumerate(ranks):
        quarter = len(counts) // 4
        early, late = counts[quarter : 2 * quarter], counts[-quarter:]
        kib = [max(c[0] for c in part) for part in (early, late)]
        # Rank 0 draws pictures, whose heap of tens of MiB is never quite the same.
        assert kib[1] - kib[0] < (10_000 if rank else 40_000), text
        assert max(c[1] for c in late) <= max(c[1] for c in early) + 4, text
        assert max(c[2] for c in late) <= max(c[2] for c in early) + 2, text
        # Four ranks have eleven groups of two, three and four; the pool keeps 64.
        assert max(c[3] for c in late) <= 11
