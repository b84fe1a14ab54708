"""The benchmark of training runs to its end on a small model, and its figures add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, environment


@pytest.mark.slow
def test_every_case_gives_a_row(tmp_path: Path) -> None:
    arguments = [
        "--out", str(tmp_path), "--model", "tiny", "--device", "cpu", "--tokens", "1024", "2048",
        "--steps", "1", "--batch-tokens", "2048", "--bucket-elements", "100000",
        "--profile", "1K s2",
        "--seconds-per-case", "0.1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_training.py"), *arguments],
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed" not in done.stdout
    report = json.loads((tmp_path / "bench_training.json").read_text())
    cases = {row["case"]: row for row in report["cases"]}
    assert set(cases) == {"1K dense", "1K s2", "2K dense", "2K s2"}
    for row in cases.values():
        tokens = row["documents"] * row["tokens"]
        assert tokens == 2048
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"])
        assert sum(row["predicted_parts_gib"].values()) == pytest.approx(row["predicted_gib"])
    # Of the model 6 per parameter and token, and 12 per pair, head and dimension.
    parameters = 2 * (64 * 16 * 2 * 6 + 3 * 64 * 176) + 64 * 512
    pairs = 2 * 1024 * 1025 / 2
    flops = 6 * parameters * 2048 + 12 * 2 * 4 * 16 * pairs
    assert cases["1K dense"]["model_tflop"] == pytest.approx(flops / 1e12, rel=1e-6)
    assert cases["2K dense"]["model_tflop"] > cases["1K dense"]["model_tflop"]
    assert cases["2K s2"]["model_tflop"] < cases["2K dense"]["model_tflop"]
    kinds = cases["1K s2"]["profile"]["kinds_s"]
    assert kinds
    assert done.stdout.strip().splitlines()[-1].startswith("| 1 x 2,048 | s2")
