"""Times block-sparse attention against its peers; a figure is printed only behind a green check.

    PYTHONPATH=kernels:. python tools/bench_kernels.py --cases s2-128k documents-64k --json out.json

Rates count the scores that the mask keeps: 4 * head_dim operations each forward, 10 * head_dim
backward. Beside each stands the clock of the multiprocessors while it was timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from typing import Any

import torch
import triton
from kernel_bench.cases import CASES, Case
from kernel_bench.gate import gate
from kernel_bench.peers import PEERS
from kernel_bench.timing import Clocks, time_ms

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import block_sparse_forward
from dist_attn_kernels.lists import build_lists


def lists_ms(case: Case) -> float:
    """Milliseconds from a rule to the kernels' tables, on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    build_lists(case.make())
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, peer: str, clocks: Clocks) -> dict[str, Any]:
    """One row: error of the check, milliseconds and rates."""
    case = CASES[name]
    torch.manual_seed(0)
    tiles = case.make()
    shapes = [(tiles.q_len, case.heads), (tiles.k_len, case.kv_heads), (tiles.k_len, case.kv_heads)]
    inputs = [
        torch.randn(n, h, case.head_dim, device="cuda", dtype=torch.bfloat16)
        for n, h in [*shapes, shapes[0]]
    ]
    kept = int(rules.area(tiles).sum()) * (case.heads // tiles.num_mask_heads)
    flops = 4 * case.head_dim * kept
    forward, backward = PEERS[peer](tiles, inputs, case)
    row: dict[str, Any] = {"case": name, "peer": peer, "density": None, "kept": kept}
    if peer == "hopper":
        row["lists_ms"] = min(lists_ms(case) for _ in range(3))
    row["density"] = kept / (case.heads * tiles.q_len * (tiles.q_len + 1) / 2)
    if not peer.endswith("dense"):
        out, lse = forward()
        lse = block_sparse_forward(*inputs[:3], build_lists(tiles))[1] if lse is None else lse
        row["error"] = gate(tiles, inputs, [out, lse, *backward()])
        if not row["error"] < 2e-2:
            return row
    else:
        flops = 2 * case.head_dim * case.heads * tiles.q_len * (tiles.q_len + 1)
    for part, fn, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        ms = time_ms(fn)
        mhz, watts = clocks.since(start)
        row |= {f"{part}_ms": ms, f"{part}_tflops": factor * flops / ms / 1e9}
        row |= {f"{part}_mhz": mhz, f"{part}_watts": watts}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def describe() -> dict[str, str]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "command": " ".join(sys.argv),
    }


def tried(name: str, peer: str, clocks: Clocks) -> dict[str, Any]:
    """A row, or what went wrong; printed either way."""
    try:
        row = measure(name, peer, clocks)
    except Exception as problem:
        row = {"case": name, "peer": peer, "problem": f"{type(problem).__name__}: {problem}"[:300]}
    torch.cuda.empty_cache()
    said = row.get("problem", f"RED: error {row.get('error')}")
    if "forward_ms" in row:
        said = (
            f"{row['density']:8.4f} {row.get('error', 0):8.1e} "
            f"{row['forward_ms']:8.2f} {row['forward_tflops']:6.0f} {row['forward_mhz']:5.0f} "
            f"{row['backward_ms']:8.2f} {row['backward_tflops']:6.0f} {row['backward_mhz']:5.0f} "
            f"{row.get('lists_ms', 0):6.1f}"
        )
    print(f"{name:18} {peer:12} {said}", flush=True)
    return row


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:11], choices=list(CASES))
    parser.add_argument("--peers", nargs="+", default=["hopper", "triton"], choices=list(PEERS))
    parser.add_argument("--also", nargs="+", default=[], metavar="CASE:PEER", help="pairs beside")
    parser.add_argument("--json", help="write every figure here")
    args = parser.parse_args()
    about, rows, clocks = describe(), [], Clocks()
    print(about)
    print(
        f"{'case':18} {'peer':12} {'density':>8} {'error':>8} "
        f"{'fwd ms':>8} {'TF/s':>6} {'MHz':>5} {'bwd ms':>8} {'TF/s':>6} {'MHz':>5} {'lists':>6}"
    )
    pairs = [(name, peer) for name in args.cases for peer in args.peers]
    for name, peer in pairs + [tuple(pair.split(":")) for pair in args.also]:
        rows.append(tried(name, peer, clocks))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"about": about, "rows": rows}, file, indent=1)
    clocks.close()


if __name__ == "__main__":
    main()
