"""Times distributed attention: masks x strategies x lengths x ranks, checked before it is timed.

    PYTHONPATH=.:kernels python tools/bench_attention.py --out docs/benchmarks/attention_cpu

Ranks are processes of this machine over gloo; with `--device cuda` they share one GPU, so that
their times show kernels and correctness, not links. A case whose error is above the bound is
reported as wrong and not timed. Rates count what the mask keeps: 4 * head_dim operations a score
forward and 10 * head_dim backward.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from torch import Tensor

from dist_attn.attention import attention
from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup, GroupPool, two_level_sets
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Mask, patterns
from dist_attn_kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Largest error, relative to the largest value, that counts as right.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
OURS = ("ring", "gather", "ulysses", "ring+ring", "ulysses+ring", "ulysses+gather")
COLUMNS = (
    *("mask", "tokens", "ranks", "strategy", "error", "forward ms", "backward ms"),
    *("TFLOP/s", "MiB sent", "peak MiB"),
)
PEERS = ("deepspeed ulysses",)


@dataclass(frozen=True)
class Options:
    """What is run."""

    device: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_lens: list[int]
    masks: list[str]
    strategies: list[str]
    layout: str
    repeats: int
    note: str


@dataclass(frozen=True)
class Result:
    """One row of the table; times over all ranks, bytes of the rank that sends most."""

    mask: str
    strategy: str
    seq_len: int
    ranks: int
    error: float | None
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflops: float | None = None
    sent_mib: float | None = None
    peak_mib: float | None = None
    note: str = ""


def documents(seq_len: int) -> np.ndarray:
    """Boundaries of documents with a long tail that fill a stream."""
    rng = np.random.default_rng(7)
    cu = [0]
    while cu[-1] < seq_len:
        cu.append(min(seq_len, cu[-1] + int(rng.lognormal(np.log(seq_len / 16), 1.2)) + 1))
    return np.array(cu)


def masks(seq_len: int, num_heads: int) -> dict[str, Mask]:
    """Masks by name, at a length."""
    cu = documents(seq_len)
    block = 64
    return {
        "causal": Causal(),
        "documents": patterns.causal_documents(cu),
        "window": patterns.sliding_window(max(1, seq_len // 16)),
        "s2": patterns.s2(seq_len, block, 4, 8, num_heads, head_shift=1),
        "shared question": patterns.shared_question(
            [0, seq_len], [seq_len // 4], np.linspace(0, seq_len, 9).astype(int)
        ),
    }


def main() -> None:
    """Parse the arguments, run, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048])
    parser.add_argument("--masks", nargs="+", default=["causal", "documents", "window", "s2"])
    parser.add_argument("--strategies", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 4], metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="a sentence about the machine for the table")
    parser.add_argument("--out", type=Path, required=True, help="path without a suffix")
    args = parser.parse_args()
    options = Options(
        device=args.device,
        dtype=args.dtype or ("bf16" if args.device == "cuda" else "fp32"),
        num_heads=args.heads[0],
        num_kv_heads=args.heads[1],
        head_dim=args.head_dim,
        seq_lens=args.seq_lens,
        masks=args.masks,
        strategies=args.strategies,
        layout=args.layout,
        repeats=args.repeats,
        note=args.note,
    )
    results = [r for n in args.ranks for r in run_ranks(options, n)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = report(options, results)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    rows = json.dumps([asdict(r) for r in results], indent=1)
    args.out.with_suffix(".json").write_text(rows, encoding="utf-8")
    plot(results, args.out.with_suffix(".png"))
    print(text)


def run_ranks(options: Options, num_ranks: int) -> list[Result]:
    """Run every case in `num_ranks` processes and return the first one's results."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        processes = [
            context.Process(
                target=rank_main,
                args=(
                    options,
                    rank,
                    num_ranks,
                    f"{folder}/rendezvous",
                    theirs if rank == 0 else None,
                ),
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            raise SystemExit(f"a run on {num_ranks} ranks failed; see above") from None
        finally:
            for process in processes:
                process.join(10)
                process.kill()


def rank_main(
    options: Options, rank: int, num_ranks: int, rendezvous: str, results_to: Any
) -> None:
    """Run every case as one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
    )
    results = []
    for seq_len in options.seq_lens:
        for mask_name in options.masks:
            mask = masks(seq_len, options.num_heads)[mask_name]
            want = expected(options, mask, seq_len)
            for strategy in options.strategies if num_ranks > 1 else ["local"]:
                bench = Bench(options, mask, seq_len)
                refusal = bench.refuse(strategy, mask_name)
                row = {"mask": mask_name, "strategy": strategy, "seq_len": seq_len}
                if refusal:
                    results.append(Result(**row, ranks=num_ranks, error=None, note=refusal))
                else:
                    results.append(Result(**row, ranks=num_ranks, **bench.measure(strategy, want)))
    if results_to is not None:
        results_to.send(results)
    dist.barrier()


def tensors(options: Options, seq_len: int) -> dict[str, Tensor]:
    """q, k, v and dout of the whole stream, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": options.num_heads, "k": options.num_kv_heads, "v": options.num_kv_heads}
    heads["dout"] = options.num_heads
    dtype, device = DTYPES[options.dtype], options.device
    return {
        n: torch.randn(seq_len, h, options.head_dim, generator=generator).to(device, dtype)
        for n, h in heads.items()
    }


def expected(options: Options, mask: Mask, seq_len: int) -> dict[str, Tensor]:
    """Output and gradients in float64, written out head by head."""
    x = {n: t.double() for n, t in tensors(options, seq_len).items()}
    repeats = options.num_heads // options.num_kv_heads
    scale = options.head_dim**-0.5
    out, dq = torch.empty_like(x["q"]), torch.empty_like(x["q"])
    dk, dv = torch.zeros_like(x["k"]), torch.zeros_like(x["v"])
    seen: dict[Any, Tensor] = {}
    for h in range(options.num_heads):
        pattern = mask.pattern(h)
        if pattern not in seen:
            seen[pattern] = torch.from_numpy(mask.materialize(seq_len, h)).to(options.device)
        q, k, v = x["q"][:, h : h + 1], *(x[n][:, h // repeats : h // repeats + 1] for n in "kv")
        o, lse = reference.attention_forward(q, k, v, seen[pattern], scale)
        grads = reference.attention_backward(
            x["dout"][:, h : h + 1], q, k, v, o, lse, seen[pattern], scale
        )
        out[:, h : h + 1], dq[:, h : h + 1] = o, grads[0]
        dk[:, h // repeats] += grads[1][:, 0]
        dv[:, h // repeats] += grads[2][:, 0]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


class Bench:
    """One mask at one length on the calling rank."""

    def __init__(self, options: Options, mask: Mask, seq_len: int) -> None:
        self.options, self.mask, self.seq_len = options, mask, seq_len
        self.size = dist.get_world_size()
        self.layout = make_layout(options.layout, documents(seq_len), self.size)
        self.ledger = Ledger()

    def refuse(self, strategy: str, mask_name: str) -> str:
        """Say why a case cannot run, or nothing."""
        if strategy in PEERS and mask_name != "causal":
            return "the peer has no such mask"
        if strategy in PEERS and self.options.num_kv_heads % self.size:
            return "the peer needs key/value heads that divide"
        if strategy == "deepspeed ulysses":
            try:
                import deepspeed.sequence.layer  # noqa: F401
            except ImportError:
                return "deepspeed is not installed"
        return ""

    def measure(self, strategy: str, want: dict[str, Tensor]) -> dict[str, Any]:
        """Check the strategy, then time it."""
        call, positions = self.prepare(strategy)
        x = {n: t[positions] for n, t in tensors(self.options, self.seq_len).items()}
        for n in "qkv":
            x[n].requires_grad_()
        out = call(x["q"], x["k"], x["v"])
        out.backward(x["dout"])
        got = {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}
        errors = [
            float((got[n].double() - w[positions]).abs().max() / w.abs().max())
            if len(positions)
            else 0.0
            for n, w in want.items()
        ]
        error = over_ranks(max(errors), dist.ReduceOp.MAX)
        if not error <= BOUNDS[self.options.dtype]:
            return {"error": error, "note": "WRONG, not timed"}
        self.ledger.calls.clear()
        self.ledger.sent_bytes.clear()
        forward, backward = [], []
        if self.options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(self.options.repeats):
            dist.barrier()
            start = self.now()
            out = call(x["q"], x["k"], x["v"])
            middle = self.now()
            out.backward(x["dout"])
            end = self.now()
            forward.append(over_ranks(middle - start, dist.ReduceOp.MAX))
            backward.append(over_ranks(end - middle, dist.ReduceOp.MAX))
        seconds = statistics.median(forward) + statistics.median(backward)
        work = 14 * self.options.head_dim * self.mask.total_area(
            self.seq_len, self.options.num_heads
        )  # fmt: skip
        sent = self.ledger.total_bytes / self.options.repeats
        if strategy in PEERS:
            # q, k, v, out there and their gradients back: this rank keeps one part in `size`.
            elements = sum(x[n].numel() for n in ("q", "k", "v", "dout"))
            sent = 2 * elements * x["q"].element_size() * (self.size - 1) / self.size
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.options.device == "cuda" else None
        return {
            "error": error,
            "forward_ms": 1e3 * statistics.median(forward),
            "backward_ms": 1e3 * statistics.median(backward),
            "tflops": work / seconds / 1e12,
            "sent_mib": over_ranks(sent, dist.ReduceOp.MAX) / 2**20,
            "peak_mib": peak,
        }

    def prepare(self, strategy: str) -> tuple[Any, Tensor]:
        """Return a function of q, k and v, and the positions that this rank holds."""
        rank = dist.get_rank()
        if strategy == "deepspeed ulysses":
            positions = torch.arange(self.seq_len).chunk(self.size)[rank]
            return deepspeed_ulysses(), positions
        pool = GroupPool()
        ranks = tuple(range(self.size))
        inner_size = None
        if "+" in strategy:
            inner_size = 2 if self.size % 2 == 0 else self.size
            pool.ensure(two_level_sets(ranks, inner_size))
        group: CommGroup = pool.get(ranks, inner_size)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(
                q, k, v, mask=self.mask, layout=self.layout, group=group, strategy=strategy,
                ledger=self.ledger,
            )  # fmt: skip

        return call, torch.from_numpy(self.layout.positions(rank))

    def now(self) -> float:
        """Time after the device is done."""
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def deepspeed_ulysses() -> Any:
    """DeepSpeed's DistributedAttention around torch's causal attention."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.comm.init_distributed("gloo", verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()

    peer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q[None], k[None], v[None], 0)[0]

    return call


def over_ranks(value: float, op: Any) -> float:
    """Reduce a number over all ranks."""
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, op)
    return float(x)


def report(options: Options, results: list[Result]) -> str:
    """Return the table with what is needed to repeat it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    lines = [
        f"# Attention over ranks on {device}",
        "",
        f"`{' '.join(sys.argv)}`, commit {commit or 'unknown'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        f"{options.dtype}, {options.num_heads} query and {options.num_kv_heads} key/value heads of "
        f"{options.head_dim}, layout {options.layout}, ranks of one machine over gloo. Times are "
        f"medians of {options.repeats}; MiB of the busiest rank, there and back. "
        f"{options.note}",
        "",
        f"| {' | '.join(COLUMNS)} | |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for r in results:
        numbers = [r.forward_ms, r.backward_ms, r.tflops, r.sent_mib, r.peak_mib]
        shown = ["-" if n is None else f"{n:.3g}" for n in numbers]
        error = "-" if r.error is None else f"{r.error:.1e}"
        head = [r.mask, str(r.seq_len), str(r.ranks), r.strategy, error]
        lines.append("| " + " | ".join([*head, *shown, r.note]) + " |")
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "an unknown processor"


def plot(results: list[Result], path: Path) -> None:
    """Draw time and bytes of the most ranks at the greatest length."""
    timed = [r for r in results if r.forward_ms is not None]
    if not timed:
        return
    ranks, seq_len = max(r.ranks for r in timed), max(r.seq_len for r in timed)
    rows = [r for r in timed if r.ranks == ranks and r.seq_len == seq_len]
    labels = [f"{r.mask}\n{r.strategy}" for r in rows]
    figure, axes = plt.subplots(2, 1, figsize=(max(6, len(rows) * 0.7), 7), layout="constrained")
    axes[0].bar(labels, [r.forward_ms for r in rows], label="forward")
    bottoms = [r.forward_ms for r in rows]
    axes[0].bar(labels, [r.backward_ms for r in rows], bottom=bottoms, label="backward")
    axes[0].set_ylabel("ms")
    axes[0].set_title(f"{seq_len} tokens, {ranks} ranks")
    axes[0].legend()
    axes[1].bar(labels, [r.sent_mib for r in rows], color="tab:gray")
    axes[1].set_ylabel("MiB sent by the busiest rank")
    for axis in axes:
        axis.tick_params("x", rotation=75, labelsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
