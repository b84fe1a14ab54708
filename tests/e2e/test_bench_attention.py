"""The benchmark of attention over ranks runs, checks before it times, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_writes_a_table_and_pictures(tmp_path: Path) -> None:
    sizes = ["--seq-lens", "256", "--heads", "4", "2", "--head-dim", "16", "--repeats", "1"]
    strategies = ["ring", "gather", "ulysses+ring", "deepspeed ulysses", "deepspeed alst"]
    subprocess.run(
        [
            *(sys.executable, "tools/bench_attention.py", *sizes, "--ranks", "1", "2"),
            *("--out", tmp_path / "out"),
            *("--masks", "causal", "documents", "s2", "--strategies", *strategies),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    rows = {
        (r["mask"], r["ranks"], r["strategy"]): r
        for r in json.loads((tmp_path / "out.json").read_text())
    }
    assert len(rows) == 3 * (1 + len(strategies))
    for (mask, ranks, strategy), row in rows.items():
        if not strategy.startswith("deepspeed"):
            assert row["error"] < 1e-5, (mask, strategy)
            assert 0 < row["growth"] < 2, (mask, strategy)
            assert (row["sent_mib"] > 0) == (ranks > 1), (mask, strategy)
            assert row["forward_ms"] > 0, (mask, strategy)
    assert rows["documents", 2, "deepspeed ulysses"]["error"] < 1e-5
    # It lets documents see each other, and is not timed: the check is one that can fail.
    leaking = rows["documents", 2, "deepspeed alst"]
    assert leaking["error"] > 0.1
    assert leaking["forward_ms"] is None
    assert "which heads" in rows["s2", 2, "deepspeed ulysses"]["note"]
    for name in ("out.md", "out.png", "out_errors.png"):
        assert (tmp_path / name).stat().st_size > 1000 or name == "out_errors.png"
    assert "no such mask: s2: deepspeed alst" in (tmp_path / "out.md").read_text()
