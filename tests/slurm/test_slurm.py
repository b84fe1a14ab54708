"""The job scripts under a real SLURM, with the uninterrupted run as the judge."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, losses, small_config
from tests.slurm.cluster import PROGRAMS, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
STEPS = 40
#: Ranks that share a busy machine may start a minute apart.
PATIENT = "run.timeout_s=180"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    missing = [p for p in PROGRAMS if not shutil.which(p) and not Path("/usr/sbin", p).exists()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; `make test-slurm` installs them")
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit from: the scripts, the environment, a corpus and its configuration."""
    folder = tmp_path_factory.mktemp("submit")
    (folder / "launch").symlink_to(ROOT / "launch")
    small_config(folder)
    # `dist-attn` of this checkout, wherever the environment was made.
    (folder / ".venv" / "bin").mkdir(parents=True)
    command = folder / ".venv" / "bin" / "dist-attn"
    command.write_text(
        f'#!/bin/bash\nexport PYTHONPATH="{ROOT}:{ROOT / "kernels"}"\n'
        f'exec {shutil.which("python")} -m dist_attn.cli "$@"\n'
    )
    command.chmod(0o755)
    return folder


def submit(cluster: SlurmCluster, place: Path, script: str, run: str, *overrides: str) -> str:
    tasks = 2 if script == "ranks.sbatch" else 1
    settings = [f"run.dir={place / run}", f"run.steps={STEPS}", PATIENT, *overrides]
    return cluster.submit(
        "--chdir", place, "--nodes=2", f"--ntasks-per-node={tasks}", "--gpus-per-node=2",
        "--cpus-per-task=1", "--job-name", run, place / "launch" / "slurm" / script,
        "--cfg", place / "small.yaml", *(part for s in settings for part in ("--set", s)),
    )  # fmt: skip


def output(place: Path, run: str, job: str) -> str:
    """All that a job and its ranks wrote."""
    files = [place / f"{run}-{job}.out", *sorted((place / "runs/slurm" / f"{run}-{job}").iterdir())]
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-20000:]}" for f in files)


def wait_for_steps(cluster: SlurmCluster, place: Path, run: str, job: str, steps: int) -> None:
    metrics = place / run / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING", "COMPLETING"), state + output(place, run, job)
        assert time.monotonic() < deadline, output(place, run, job)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(cluster: SlurmCluster, place: Path) -> list[float]:
    """The curve of a run that nothing happens to, by one launcher per node."""
    job = submit(cluster, place, "torchrun.sbatch", "whole")
    end = cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", timeout_s=900)
    assert end["JobState"] == "COMPLETED", output(place, "whole", job)
    assert "4 ranks on 2 nodes are fit" in output(place, "whole", job)
    return losses(place / "whole")


def test_a_stopped_job_and_a_lost_node_are_requeued_and_give_the_uninterrupted_curve(
    cluster: SlurmCluster, place: Path, whole: list[float]
) -> None:
    job = submit(cluster, place, "ranks.sbatch", "run")
    wait_for_steps(cluster, place, "run", job, 6)
    # What --signal=USR1@300 does five minutes before the time limit.
    cluster.run("scancel", "--signal=USR1", job)
    wait_for_restarts(cluster, job, 1)
    at_stop = len(losses(place / "run"))
    assert 6 <= at_stop < STEPS
    log = (place / "runs/slurm" / f"run-{job}" / "rank-0.log").read_text()
    assert f"stopped by SIGUSR1 after step {at_stop - 1}" in log

    wait_for_steps(cluster, place, "run", job, at_stop + 6)
    cluster.lose_node("n2")
    wait_for_restarts(cluster, job, 2)
    cluster.start_node("n2")
    end = cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", timeout_s=900)
    assert end["JobState"] == "COMPLETED", output(place, "run", job)
    assert end["Restarts"] == "2"
    assert losses(place / "run") == whole
    assert len(whole) == STEPS


def wait_for_restarts(cluster: SlurmCluster, job: str, restarts: int) -> None:
    deadline = time.monotonic() + 300
    while int(cluster.job(job)["Restarts"]) < restarts:
        assert time.monotonic() < deadline, cluster.job(job)
        time.sleep(0.2)


def test_stages_begin_with_the_weights_of_the_stage_before(
    cluster: SlurmCluster, place: Path
) -> None:
    configs = []
    for stage, tokens in ((1, 256), (2, 512)):
        text = (place / "small.yaml").read_text()
        text = text.replace("max_document_tokens: 512", f"max_document_tokens: {tokens}")
        text = text.replace("steps: 12", f"steps: {STEPS if stage == 1 else 2}")
        text = text.replace("timeout_s: 60", "timeout_s: 180")
        configs.append(place / f"stage{stage}.yaml")
        configs[-1].write_text(text)
    told = cluster.run(
        place / "launch/slurm/stages.sh", "--chdir", place, "--nodes=2", "--ntasks-per-node=2",
        "--gpus-per-node=2", "--cpus-per-task=1", "--", *configs,
    )  # fmt: skip
    jobs = re.findall(r"job (\d+)", told)
    assert len(jobs) == 4
    for job in jobs[:3]:
        end = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout_s=900)
        assert end["JobState"] == "COMPLETED", told + cluster.logs()
    end = cluster.wait(jobs[3], "COMPLETED", "FAILED", "CANCELLED", timeout_s=300)
    assert end["JobState"] == "COMPLETED"
    first, second = (losses(place / "runs" / f"stage-{stage}") for stage in (1, 2))
    # Untrained weights would begin where stage 1 began.
    assert second[0] < (first[0] + first[-1]) / 2
    assert (place / "runs/stage-2/export/config.json").is_file()


def test_bad_input_is_not_started_again(cluster: SlurmCluster, place: Path) -> None:
    job = submit(cluster, place, "ranks.sbatch", "bad", "model.hidden_size=33")
    end = cluster.wait(job, "COMPLETED", "FAILED", timeout_s=300)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    text = output(place, "bad", job)
    assert "hidden_size must be a multiple of num_heads" in text
    assert "not started again" in text
    assert not (place / "bad").exists()


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, place: Path) -> None:
    job = submit(cluster, place, "ranks.sbatch", "cancelled")
    wait_for_steps(cluster, place, "cancelled", job, 2)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", timeout_s=180)
    time.sleep(5)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert cluster.job(job)["Restarts"] == "0"
