"""Measures what several GPUs of this host do together, and checks it, in one command.

    torchrun --standalone --nproc-per-node gpu tools/bench_multi_gpu.py --out FILE

Four parts, each of which can be left out by `--parts`: exchange rates against NCCL's own for the
same bytes; distributed attention against peers and an ideal, each result checked before it is
timed; training steps, planned against the best static degree, predicted against measured; and the
largest context at which one step runs. The table comes last; `--out` gets it as Markdown, JSON and
pictures. `--budget-s` ends it in time: what was not run is listed.

Rates count what the mask keeps: 4 * head_dim operations a score forward, 10 * head_dim backward.
The ideal is one GPU's rate on the whole problem, by the fastest kernel there is for it here. A
rank checks its part against that GPU's result, which is itself checked against float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from multi_gpu import attention as attention_part
from multi_gpu import rates as rates_part
from multi_gpu import training as training_part
from multi_gpu.timing import Clock, Report

#: Seconds that attention leaves for the parts after it.
TRAINING_S, CONTEXT_S = 190.0, 90.0
PARTS = ("rates", "attention", "training", "context")


def main() -> None:
    """Run the parts on every rank; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=460.0)
    parser.add_argument("--tokens", type=int, nargs="+", help="of all GPUs together")
    parser.add_argument("--masks", nargs="+", choices=list(attention_part.MASKS))
    parser.add_argument("--heads", nargs="+", help="query:key/value, such as 32:8")
    parser.add_argument("--methods", nargs="+", default=list(attention_part.METHODS))
    parser.add_argument("--out", type=Path, help="path without a suffix")
    args = parser.parse_args()
    clock = Clock(args.budget_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    report = Report(rank == 0)
    if {"rates", "attention"} & set(args.parts):
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", device_id=device, pg_options=options)
        if "rates" in args.parts:
            rates_part.run(report, clock)
        if "attention" in args.parts:
            later = {"training": TRAINING_S, "context": CONTEXT_S}
            keep_s = sum(seconds for part, seconds in later.items() if part in args.parts)
            attention_part.run(report, clock, chosen(args), args.methods, keep_s)
        dist.barrier()
        dist.destroy_process_group()
    torch.cuda.empty_cache()
    if rank == 0:
        # Training starts ranks of its own.
        if "training" in args.parts:
            keep_s = CONTEXT_S if "context" in args.parts else 0.0
            training_part.steps(report, clock, size, keep_s)
        if "context" in args.parts:
            training_part.largest_context(report, clock, size)
        text = report.text(header(size, clock))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".md").write_text(text, encoding="utf-8")
            rows = json.dumps(report.rows, indent=1)
            args.out.with_suffix(".json").write_text(rows + "\n", encoding="utf-8")
            attention_part.plot(report, args.out.with_suffix(".png"))
        print(text)


def chosen(args: argparse.Namespace) -> list[attention_part.Case]:
    """The cases that are asked for, or the usual ones."""
    if not (args.tokens or args.masks or args.heads):
        return list(attention_part.DEFAULT_CASES)
    return attention_part.cases(
        args.tokens or [2**15, 2**17],
        args.masks or list(attention_part.MASKS),
        args.heads or ["32:32"],
    )


def header(size: int, clock: Clock) -> list[str]:
    """What is needed to repeat it."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        f"# {size} x {torch.cuda.get_device_name()}",
        "",
        f"`{' '.join(sys.argv)}`, commit {commit or 'unknown'}, torch {torch.__version__}, NCCL "
        f"{nccl}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; "
        f"{clock.elapsed_s:.0f} s in all.",
        "",
    ]


if __name__ == "__main__":
    main()
