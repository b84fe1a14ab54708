"""The kernels build for Ampere and Hopper on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_attn_kernels.block_sparse_triton import A100_SHARED_BYTES, H100_SHARED_BYTES

ROOT = Path(__file__).parents[3]


def compiled(arch: int, cache: Path) -> list[list[str]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}", "TRITON_CACHE_DIR": str(cache)}
    program = Path(__file__).with_name("compile_block_sparse.py")
    run = subprocess.run(
        [sys.executable, str(program), str(arch)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [line.split(maxsplit=4) for line in run.stdout.splitlines()]


@pytest.mark.timeout(240)
def test_hopper(tmp_path: Path) -> None:
    """Hopper's own matrix instructions, none of them serialised, inside its shared memory."""
    rows = compiled(90, tmp_path)
    kernels = ("dkv_kernel", "dq_kernel", "forward_kernel")
    assert sorted(row[:2] for row in rows) == [[k, i] for k in kernels for i in ("pairs", "single")]
    for name, items, unit, shared, complaints in rows:
        assert unit == "wgmma", (name, items)
        assert int(shared) <= H100_SHARED_BYTES, (name, items)
        assert complaints == "[]", (name, items)


@pytest.mark.timeout(240)
def test_ampere(tmp_path: Path) -> None:
    rows = compiled(80, tmp_path)
    assert [row[0] for row in rows] == ["forward_kernel", "dq_kernel", "dkv_kernel"]
    for name, _, unit, shared, _ in rows:
        assert unit == "mma", name
        assert int(shared) <= A100_SHARED_BYTES, name
