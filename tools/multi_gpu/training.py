"""Training steps on several GPUs: planned against static degrees, and the largest context.

Every run is `dist-attn train` in processes of its own, as a user would start it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from multi_gpu.timing import Clock, Report

from dist_attn.training.run_folder import read_metrics

#: Steps that are not counted: kernels are compiled, plans of cuDNN made, memory found.
WARM_UP = 4
STEPS = 10
#: Seconds of one run, its start included.
RUN_S = 40.0
MODEL = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_layers": 12,
    "num_heads": 16,
    "num_kv_heads": 8,
    "gradient_checkpointing": True,
    "dtype": "bf16",
}


def steps(report: Report, clock: Clock, size: int, keep_s: float) -> None:
    """Train on the same long-tail batches by plans and by each static degree.

    Leaves `keep_s` seconds of the clock.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        costs = _calibrated(report, clock, folder, size)
        degrees = [d for d in range(1, size + 1) if size % d == 0]
        ways = [("planned", {})]
        ways += [(f"static {d}", {"mode": "static", "static_degree": d}) for d in reversed(degrees)]
        planned: list[dict[str, Any]] = []
        for way, planner in ways:
            if clock.left_s - keep_s < RUN_S:
                report.note(f"training, {way}, was left out: time was up")
                continue
            done, lines = _train(folder, way, _config(folder, planner, costs), 150)
            if not lines:
                report.note(f"training, {way}: {done}")
                continue
            counted = lines[WARM_UP:]
            measured = sum(x["step_s"] for x in counted)
            predicted = sum(x["predicted_s"] for x in counted)
            planned = counted if way == "planned" else planned
            report.add(
                "Training",
                plans=way,
                steps=len(counted),
                tokens=sum(x["tokens"] for x in counted),
                measured_s=measured,
                predicted_s=predicted,
                error=f"{predicted / measured - 1:+.1%}",
                step_error=f"{_median_error(counted):.1%}",
                tokens_per_s=sum(x["tokens"] for x in counted) / measured,
                slowest_s=max(x["step_s"] for x in counted),
                of_planned=_median_ratio(counted, planned),
                memory_gib=max(x["memory_gib"] for x in counted),
            )


def largest_context(report: Report, clock: Clock, size: int) -> None:
    """Double one document until a step no longer runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        best: int | None = None
        length = 2**18
        while clock.left_s > 45:
            config = _config(folder, {}, [])
            _one_document(folder / "long", length)
            config["data"] |= {
                "corpus": {"kind": "text", "path": str(folder / "long")},
                "max_document_tokens": length,
                "batch": {"documents": 1},
            }
            config["run"]["steps"] = 1
            done, lines = _train(folder, f"context-{length}", config, clock.left_s)
            if not lines:
                report.note(f"a step on one document of {length:,} tokens: {done}")
                break
            best = length
            report.add(
                "Largest context",
                tokens=length,
                step_s=lines[0]["step_s"],
                memory_gib=lines[0]["memory_gib"],
            )
            length *= 2
        if best is None:
            report.note("largest context: nothing ran")


def _config(folder: Path, planner: dict[str, Any], costs: list[str]) -> dict[str, Any]:
    longest = 65536
    return {
        "run": {"steps": STEPS, "dir": "", "device": "cuda", "timeout_s": 120},
        "model": dict(MODEL),
        "data": {
            "corpus": {"kind": "stdlib"},
            "max_document_tokens": longest,
            "overlong": "drop",
            "batch": {"tokens": 4 * longest},
            "cache_dir": str(folder / "cache"),
        },
        "attention": {"strategies": ["gather", "ulysses"]},
        "planner": planner,
        "cluster": "auto",
        "cost": {"calibrations": costs},
        "engine": {"zero_stage": 2, "bucket_elements": 50_000_000},
        "checkpoint": {"at_end": False},
        "logging": {"tensorboard": False, "progress_bar": False},
    }


def _calibrated(report: Report, clock: Clock, folder: Path, size: int) -> list[str]:
    """Measure this machine for the cost model; where that fails say so, and go by spec sheets."""
    target, config = folder / "calibration.yaml", folder / "calibrate.yaml"
    config.write_text(yaml.safe_dump(_config(folder, {}, [])), encoding="utf-8")
    command = ["calibrate", "--cfg", str(config), "--out", str(target), "--max-tokens", "32768"]
    done = _run([*command, "--nproc-per-node", str(size)], min(120, clock.left_s))
    if target.is_file():
        return [str(target)]
    report.note(f"not calibrated, predictions are from the spec sheet: {done}")
    return []


def _train(
    folder: Path, name: str, config: dict[str, Any], timeout_s: float
) -> tuple[str, list[dict[str, Any]]]:
    run_folder = folder / name.replace(" ", "-")
    config["run"]["dir"] = str(run_folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done = _run(["train", "--cfg", str(path)], timeout_s)
    metrics = run_folder / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    return done, lines if len(lines) == config["run"]["steps"] else []


def _run(arguments: list[str], timeout_s: float) -> str:
    """Run a command of dist-attn; the end of what it said, which tells why it failed."""
    command = [sys.executable, "-m", "dist_attn.cli", *arguments]
    # It is no rank of this run.
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:.0f} s"
    said = (done.stdout + done.stderr).strip().splitlines()
    return f"exit code {done.returncode}: {said[-1] if said else 'nothing said'}"


def _median_error(lines: list[dict[str, Any]]) -> float:
    return statistics.median(abs(x["predicted_s"] / x["step_s"] - 1) for x in lines)


def _median_ratio(lines: list[dict[str, Any]], planned: list[dict[str, Any]]) -> float | None:
    """Time of a step over that of the same step by plans, the median over the steps."""
    if not planned:
        return None
    pairs = zip(lines, planned, strict=True)
    return statistics.median(a["step_s"] / b["step_s"] for a, b in pairs)


def _one_document(folder: Path, length: int) -> None:
    """A text of so many bytes, as the byte tokenizer counts, with room for its end."""
    folder.mkdir(exist_ok=True)
    sentence = "The quick brown fox jumps over the lazy dog. "
    text = (sentence * (length // len(sentence) + 1))[: length - 2]
    (folder / "document.txt").write_text(text, encoding="utf-8")
