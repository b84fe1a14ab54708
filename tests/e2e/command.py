"""Run `dist-attn` as a user does, on a configuration small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dist_attn.training.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

#: A run of seconds: few short documents, a checkpoint now and then.
SMALL = """
run: {dir: DIR, steps: 12, timeout_s: 60}
model: {hidden_size: 32, intermediate_size: 64}
data:
  corpus: {kind: text, path: TEXTS, glob: "*.txt"}
  max_document_tokens: 512
  overlong: split
  batch: {tokens: 1024}
planner: {max_tokens_per_device: 128}
engine: {zero_stage: 2}
optimizer: {lr: 0.01}
checkpoint: {every_steps: 4, keep: 3}
logging: {tensorboard: false}
"""


def small_config(folder: Path, extra: str = "") -> Path:
    """Write a small corpus and its configuration into `folder`."""
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for index in range(40):
        words = " ".join(f"word{(index * 7 + k) % 23}" for k in range(3 + (index * index) % 97))
        (texts / f"{index:02d}.txt").write_text(words, encoding="utf-8")
    path = folder / "small.yaml"
    text = SMALL.replace("DIR", str(folder / "run")).replace("TEXTS", str(texts))
    path.write_text(text + extra, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels")]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # Several runs share the machine.
    return clean | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Begin a command of `dist-attn`."""
    return subprocess.Popen(
        [sys.executable, "-m", "dist_attn.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The mask of somebody who does not care; what a run leaves must be safe all the same.
        umask=0,
    )


def run(*arguments: str | Path, timeout_s: float = 200.0) -> subprocess.CompletedProcess[str]:
    """Run a command of `dist-attn` to its end."""
    return finish(start(*arguments), timeout_s)


def finish(
    process: subprocess.Popen[str], timeout_s: float = 200.0
) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a command that was started."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(
            f"not done after {timeout_s} s:\n{out[-3000:]}\n{err[-3000:]}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_steps(process: subprocess.Popen[str], run_folder: Path, steps: int) -> None:
    """Return as soon as a run that was started has recorded so many steps."""
    metrics = run_folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline, "the steps never came"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def losses(run_folder: Path) -> list[float]:
    """The recorded loss of each step; the steps must be 0, 1, 2, ..."""
    lines: list[dict[str, Any]] = read_metrics(run_folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]
