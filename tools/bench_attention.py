"""Times distributed attention: masks x strategies x lengths x ranks, checked before it is timed.

    PYTHONPATH=.:kernels python tools/bench_attention.py --out docs/benchmarks/attention_cpu

Ranks are processes of this machine over gloo; with `--device cuda` they share one GPU, so that
their times show kernels and correctness, not links. A case whose error is above the bound is
reported as wrong and not timed. Rates count what the mask keeps: 4 * head_dim operations a score
forward and 10 * head_dim backward.

Peers run where they are installed, or lie in a folder that is named by `--peers`:

    pip install --no-deps --target DIR yunchang ring-flash-attn
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attention_bench import peers
from attention_bench.memory import Memory
from attention_bench.report import Result, cpu_name, plot, plot_errors, table
from attention_bench.wire import Wire, counted
from torch import Tensor

from dist_attn.attention import attention
from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup, GroupPool, single_rank_group, two_level_sets
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Mask, patterns
from dist_attn_kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Largest error, relative to the largest value, that counts as right.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
ONE_LEVEL = ("ring", "gather", "ulysses")
OURS = (*ONE_LEVEL, *(f"{inner}+{outer}" for inner in ONE_LEVEL for outer in ONE_LEVEL))
NAMES = ("out", "dq", "dk", "dv")


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
    without_times: bool
    peers_folder: str | None


def documents(seq_len: int) -> np.ndarray:
    """Boundaries of documents with a long tail that fill a stream."""
    rng = np.random.default_rng(7)
    cu = [0]
    while cu[-1] < seq_len:
        cu.append(min(seq_len, cu[-1] + int(rng.lognormal(np.log(seq_len / 16), 1.2)) + 1))
    return np.array(cu)


def cases(options: Options, seq_len: int) -> dict[str, peers.Case]:
    """Cases by the name of the mask, at a length."""
    cu, whole, window = documents(seq_len), np.array([0, seq_len]), max(1, seq_len // 16)
    scores = np.random.default_rng(3).random((options.num_heads, *[-(-seq_len // 128)] * 2))
    rules: dict[str, tuple[Mask, np.ndarray, int]] = {
        "causal": (Causal(), whole, -1),
        "documents": (patterns.causal_documents(cu), cu, -1),
        "window": (patterns.sliding_window(window), whole, window - 1),
        "s2": (patterns.s2(seq_len, 64, 4, 8, options.num_heads), whole, -1),
        "shared question": (
            patterns.shared_question(
                [0, seq_len], [seq_len // 4], np.linspace(0, seq_len, 9).astype(int)
            ),
            whole,
            -1,
        ),
        "global sliding": (patterns.global_sliding(window, window), whole, -1),
        "block causal documents": (patterns.block_causal_documents(cu, 64), cu, -1),
        "top blocks": (patterns.top_blocks(scores, 4, 128, 128) & Causal(), whole, -1),
    }
    return {
        name: peers.Case(name, mask, ends, before, options.num_kv_heads)
        for name, (mask, ends, before) in rules.items()
    }


def main() -> None:
    """Parse the arguments, run, and write the table and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048])
    parser.add_argument("--masks", nargs="+", default=["causal", "documents", "window", "s2"])
    parser.add_argument("--strategies", nargs="+", default=[*OURS, *peers.PEERS])
    parser.add_argument("--layout", default="zigzag", help="of our strategies")
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 4], metavar=("QUERY", "KV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="0: check and count, time nothing")
    parser.add_argument(
        "--without-times", action="store_true", help="for a machine that does other work too"
    )
    parser.add_argument("--peers", help="a folder with yunchang and ring_flash_attn")
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
        without_times=args.without_times,
        peers_folder=args.peers,
    )
    results: list[Result] = []
    for num_ranks in args.ranks:
        for some in run_ranks(options, num_ranks):
            # What is there is written at once: a run that is cut short loses nothing.
            results += some
            text = write(options, args, results)
            print(f"{some[0].mask}, {some[0].seq_len} tokens, {num_ranks} ranks", file=sys.stderr)
    plot(results, args.out.with_suffix(".png"))
    plot_errors(results, args.out.with_name(args.out.name + "_errors.png"))
    print(text)


def write(options: Options, args: argparse.Namespace, results: list[Result]) -> str:
    """Write the table, and the rows as JSON; return the table."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    text = table(f"Attention over ranks on {device}", about(options, args.note), results)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    rows = json.dumps([asdict(r) for r in results], indent=1)
    args.out.with_suffix(".json").write_text(rows, encoding="utf-8")
    return text


def about(options: Options, note: str) -> str:
    """Say what the table shows."""
    times = f"Times are medians of {options.repeats}"
    if options.without_times:
        times = "No times are given, since the machine did other work too"
    return (
        f"{options.dtype}, {options.num_heads} query and {options.num_kv_heads} key/value heads of "
        f"{options.head_dim}, layout {options.layout} for our strategies, ranks of one machine "
        f"over gloo. `error` is the worst of out, dq, dk and dv against float64, relative to the "
        f"largest value; beside it the root mean square of the differences over that of one "
        f"device. {times}; MiB that the busiest rank sends, forward and backward; peak MiB of a "
        f"rank beside what it held before. Peers exchange and merge by their own code, around the "
        f"same kernels. {note}"
    )


def run_ranks(options: Options, num_ranks: int) -> Iterator[list[Result]]:
    """Run every case in `num_ranks` processes; yield the first one's results mask by mask."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        meeting = f"{folder}/rendezvous"
        processes = [
            context.Process(
                target=rank_main,
                args=(options, rank, num_ranks, meeting, theirs if rank == 0 else None),
            )
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            for _ in range(len(options.seq_lens) * len(options.masks)):
                yield ours.recv()
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
    if options.peers_folder:
        sys.path.append(options.peers_folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
    )
    wire = Wire()
    with counted(wire):
        for seq_len in options.seq_lens:
            by_name = cases(options, seq_len)
            for mask_name in options.masks:
                bench = Bench(options, by_name[mask_name], wire)
                results = []
                for strategy in options.strategies if num_ranks > 1 else ["local"]:
                    row = {"mask": mask_name, "strategy": strategy, "seq_len": seq_len}
                    results.append(Result(**row, ranks=num_ranks, **bench.measure(strategy)))
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


def expected(options: Options, case: peers.Case) -> dict[str, Tensor]:
    """Output and gradients in float64, written out head by head on rank 0."""
    x = {n: t.double() for n, t in tensors(options, case.seq_len).items()}
    repeats = options.num_heads // options.num_kv_heads
    scale = options.head_dim**-0.5
    made = {n: torch.zeros_like(x[n[-1] if n != "out" else "q"]) for n in NAMES}
    seen: dict[Any, Tensor] = {}
    for h in range(options.num_heads if dist.get_rank() == 0 else 0):
        pattern, kv = case.mask.pattern(h), h // repeats
        if pattern not in seen:
            dense = torch.from_numpy(case.mask.materialize(case.seq_len, h))
            seen = {pattern: dense.to(options.device)}
        q, k, v = x["q"][:, h : h + 1], *(x[n][:, kv : kv + 1] for n in "kv")
        out, lse = reference.attention_forward(q, k, v, seen[pattern], scale)
        dout = x["dout"][:, h : h + 1]
        grads = reference.attention_backward(dout, q, k, v, out, lse, seen[pattern], scale)
        made["out"][:, h : h + 1], made["dq"][:, h : h + 1] = out, grads[0]
        made["dk"][:, kv] += grads[1][:, 0]
        made["dv"][:, kv] += grads[2][:, 0]
    for name, tensor in made.items():
        shared = tensor.cpu()
        dist.broadcast(shared, 0)
        made[name] = shared.to(options.device)
    return made


class Bench:
    """One mask at one length on the calling rank."""

    def __init__(self, options: Options, case: peers.Case, wire: Wire) -> None:
        self.options, self.case, self.wire = options, case, wire
        self.size = dist.get_world_size()
        self.ledger = Ledger()
        self.whole = tensors(options, case.seq_len)
        self.want = expected(options, case)
        #: Squares of one device's differences, by tensor.
        self.alone = self.squares(*self.run(self.alone_call(), torch.arange(case.seq_len)))

    def measure(self, strategy: str) -> dict[str, Any]:
        """Check the strategy, then time it."""
        refusal = peers.refuse(strategy, self.case) if strategy in peers.PEERS else ""
        if refusal:
            return {"note": refusal}
        self.wire.clear()
        self.ledger.calls.clear()
        self.ledger.sent_bytes.clear()
        call, positions, note = self.prepare(strategy)
        try:
            got, positions = self.run(call, positions)
        except Exception as error:
            # What one rank refuses all do: peers look at nothing but shapes and masks.
            return {"note": f"it fails: {type(error).__name__}: {str(error)[:120]}"}
        sent = self.wire.sent_bytes
        if strategy not in peers.PEERS:
            assert sent == self.ledger.total_bytes, "the ledger counts what is sent"
        error = over_ranks(self.error(got, positions), dist.ReduceOp.MAX)
        mine = self.squares(got, positions)
        growth = max(
            math.sqrt(over_ranks(mine[n], dist.ReduceOp.SUM) / self.alone[n]) for n in NAMES
        )
        found = {"error": error, "growth": growth, "note": note}
        found["sent_mib"] = over_ranks(sent, dist.ReduceOp.MAX) / 2**20
        if not error <= BOUNDS[self.options.dtype]:
            return {**found, "note": f"WRONG, not timed; {note}".rstrip("; ")}
        return {**found, **(self.times(call, positions) if self.options.repeats else {})}

    def times(self, call: peers.Call, positions: Tensor) -> dict[str, float | None]:
        """Forward and backward milliseconds, rate, and memory."""
        x = self.local(positions)
        forward, backward, peaks = [], [], []
        for _ in range(self.options.repeats):
            dist.barrier()
            memory = Memory(self.options.device)
            start = self.now()
            out = call(x["q"], x["k"], x["v"])
            middle = self.now()
            out.backward(x["dout"])
            end = self.now()
            forward.append(over_ranks(middle - start, dist.ReduceOp.MAX))
            backward.append(over_ranks(end - middle, dist.ReduceOp.MAX))
            peaks.append(memory.peak_mib())
        seconds = statistics.median(forward) + statistics.median(backward)
        area = self.case.mask.total_area(self.case.seq_len, self.options.num_heads)
        peak = over_ranks(statistics.median(p or 0.0 for p in peaks), dist.ReduceOp.MAX)
        if self.options.without_times:
            return {"peak_mib": peak or None}
        return {
            "forward_ms": 1e3 * statistics.median(forward),
            "backward_ms": 1e3 * statistics.median(backward),
            "tflops": 14 * self.options.head_dim * area / seconds / 1e12,
            "peak_mib": peak or None,
        }

    def prepare(self, strategy: str) -> tuple[peers.Call, Tensor, str]:
        """Return a function of q, k and v, the positions that this rank holds, and a note."""
        if strategy in peers.PEERS:
            peer = peers.prepare(strategy, self.case)
            return peer.call, peer.positions, peer.note
        layout = make_layout(self.options.layout, self.case.cu_seqlens, self.size)
        pool = GroupPool()
        ranks = tuple(range(self.size))
        inner_size = None
        if "+" in strategy:
            inner_size = 2 if self.size % 2 == 0 else self.size
            pool.ensure(two_level_sets(ranks, inner_size))
        group: CommGroup = pool.get(ranks, inner_size)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(
                q, k, v, mask=self.case.mask, layout=layout, group=group, strategy=strategy,
                ledger=self.ledger,
            )  # fmt: skip

        return call, torch.from_numpy(layout.positions(dist.get_rank())), ""

    def alone_call(self) -> peers.Call:
        """Attention on one device, without ranks."""
        layout = make_layout("contiguous", [0, self.case.seq_len], 1)
        group = single_rank_group(dist.get_rank())
        return lambda q, k, v: attention(
            q, k, v, mask=self.case.mask, layout=layout, group=group, strategy="local"
        )

    def local(self, positions: Tensor) -> dict[str, Tensor]:
        """This rank's tensors, leaves of a graph."""
        x = {n: t[positions.to(t.device)] for n, t in self.whole.items()}
        for n in "qkv":
            x[n].requires_grad_()
        return x

    def run(self, call: peers.Call, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward; out and gradients, and where they belong."""
        x = self.local(positions)
        out = call(x["q"], x["k"], x["v"])
        out.backward(x["dout"])
        return {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}, positions

    def error(self, got: dict[str, Tensor], positions: Tensor) -> float:
        """Largest difference over the largest wanted value, the worst of the tensors."""
        where = positions.to(self.options.device)
        errors = [
            float((got[n].double() - w[where]).abs().max() / w.abs().max())
            for n, w in self.want.items()
            if len(where)
        ]
        # NaN is an error too, and max() would pass it by.
        return max((math.inf if math.isnan(e) else e for e in errors), default=0.0)

    def squares(self, got: dict[str, Tensor], positions: Tensor) -> dict[str, float]:
        """Sum of the squared differences of each tensor."""
        where = positions.to(self.options.device)
        return {n: float((got[n].double() - w[where]).square().sum()) for n, w in self.want.items()}

    def now(self) -> float:
        """Time after the device is done."""
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def over_ranks(value: float, op: Any) -> float:
    """Reduce a number over all ranks."""
    x = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(x, op)
    return float(x)


if __name__ == "__main__":
    main()
