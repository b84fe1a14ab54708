"""Distributed attention against peers and against an ideal."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from multi_gpu import peers
from multi_gpu.timing import Clock, Report, paired_seconds, warm_up
from torch import Tensor

from dist_attn.attention import attention
from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup, GroupPool, single_rank_group
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Full, Mask, patterns

DIM, DTYPE = 128, torch.bfloat16
#: Largest difference to one GPU's result, relative in the 2-norm; both are rounded to bf16.
BOUND = 2e-2
#: Strategy, layout, and whether GPUs copy to each other.
OURS = {
    "gather": ("gather", "zigzag", True),
    "ring": ("ring", "zigzag", True),
    "ulysses": ("ulysses", "contiguous", True),
    "gather, NCCL": ("gather", "zigzag", False),
}
METHODS = (*OURS, *peers.PEERS)
SAMPLES = 48


def long_tail(seq_len: int) -> np.ndarray:
    """Boundaries of documents with a long tail: lognormal with median 1.3K, and Pareto from 16K."""
    rng = np.random.default_rng(5)
    cu = [0]
    while cu[-1] < seq_len:
        tail = rng.random() < 0.035
        size = 16384 * (1 + rng.pareto(0.95)) if tail else rng.lognormal(np.log(1300), 1.3)
        cu.append(min(seq_len, cu[-1] + 1 + int(min(size, seq_len // 4))))
    return np.array(cu)


#: Name to (boundaries of the documents that a layout deals out, mask).
MASKS: dict[str, Callable[[int, int], tuple[np.ndarray, Mask]]] = {
    "causal": lambda n, heads: (np.array([0, n]), Causal()),
    "full": lambda n, heads: (np.array([0, n]), Full()),
    "documents": lambda n, heads: (long_tail(n), patterns.causal_documents(long_tail(n))),
    "s2": lambda n, heads: (np.array([0, n]), patterns.s2(n, 64, 16, 16, heads, head_shift=1)),
    "window": lambda n, heads: (np.array([0, n]), patterns.sliding_window(4096)),
}


@dataclass(frozen=True)
class Case:
    """One problem, of all GPUs together."""

    mask_name: str
    seq_len: int
    num_heads: int
    num_kv_heads: int

    @property
    def group_sizes(self) -> str:
        """Heads as the field writes them."""
        return f"{self.num_heads}:{self.num_kv_heads}"


@dataclass(frozen=True)
class Problem:
    """A case's tensors, all of them on every rank, with one GPU's results.

    Attributes:
        whole: attention on one GPU.
        operations: of forward and backward.
    """

    case: Case
    mask: Mask
    cu_seqlens: np.ndarray
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    whole: Callable[[Tensor, Tensor, Tensor], Tensor]
    operations: int


#: What is measured unless something is asked for, the most telling first.
DEFAULT_CASES = (
    *(Case(name, 2**15, 32, 32) for name in ("causal", "documents")),
    Case("causal", 2**15, 32, 8),
    Case("causal", 2**17, 32, 32),
    *(Case(name, 2**15, 32, 32) for name in ("full", "s2", "window")),
    *(Case(name, 2**17, 32, 32) for name in ("documents", "s2", "window")),
    Case("causal", 2**17, 32, 8),
    *(Case(name, 2**18, 32, 32) for name in ("documents", "s2", "window", "causal")),
    *(Case(name, 2**14, 32, 32) for name in ("causal", "documents")),
    Case("full", 2**17, 32, 32),
)


def cases(tokens: list[int], masks: list[str], heads: list[str]) -> list[Case]:
    """Every combination."""
    found = []
    for seq_len, pair, name in itertools.product(tokens, heads, masks):
        num_heads, num_kv_heads = (int(x) for x in pair.split(":"))
        found.append(Case(name, seq_len, num_heads, num_kv_heads))
    return found


@functools.cache
def group_of_all(copies: bool) -> CommGroup:
    """All ranks, whose GPUs copy to each other or exchange by NCCL's kernels."""
    pool = GroupPool(copy_engines=copies)
    ranks = tuple(range(dist.get_world_size()))
    pool.ensure([ranks])
    return pool.get(ranks)


def run(
    report: Report, clock: Clock, chosen: list[Case], methods: list[str], keep_s: float
) -> None:
    """Check and time every method on every case, and leave `keep_s` seconds of the clock."""
    for case in chosen:
        if not clock.allows(_guess_s(case, len(methods)), keep_s):
            report.note(f"attention {case} was left out: time was up")
            continue
        try:
            problem = _problem(case)
        except torch.OutOfMemoryError:
            report.note(f"attention {case} was left out: one GPU cannot hold it for comparison")
            continue
        for name in methods:
            _one(report, problem, name)
        del problem
        torch.cuda.empty_cache()


def _guess_s(case: Case, num_methods: int) -> float:
    """Seconds of a case: some for each method, or what its attention takes at 400 TFLOP/s."""
    share = {"full": 1.0, "causal": 0.5}.get(case.mask_name, 0.1)
    both_s = 14 * DIM * share * case.seq_len**2 * case.num_heads / 400e12
    return 3 + num_methods * max(5, 8 * both_s)


def _problem(case: Case) -> Problem:
    cu, mask = MASKS[case.mask_name](case.seq_len, case.num_heads)
    generator = torch.Generator(device="cuda").manual_seed(1)
    heads = {"q": case.num_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    heads["dout"] = case.num_heads
    inputs = {
        name: torch.randn(case.seq_len, n, DIM, device="cuda", generator=generator).to(DTYPE)
        for name, n in heads.items()
    }
    layout = make_layout("contiguous", cu, 1)
    alone = single_rank_group()

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, layout=layout, group=alone, strategy="local")

    results = _results(whole, inputs)
    _check_against_float64(mask, inputs, results["out"])
    operations = 14 * DIM * mask.total_area(case.seq_len, case.num_heads)
    problem = Problem(case, mask, cu, inputs, results, whole, operations)
    warm_up(_calls(whole, inputs)[1])
    return problem


def _results(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = [inputs[n].detach().requires_grad_() for n in "qkv"]
    out = call(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs["dout"])
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def _calls(
    call: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward, and forward and backward together."""
    leaves = [inputs[n].detach().requires_grad_() for n in "qkv"]
    without_grad = [inputs[n] for n in "qkv"]

    def forward() -> Any:
        with torch.no_grad():
            return call(*without_grad)

    def both() -> Any:
        return torch.autograd.grad(call(*leaves), leaves, inputs["dout"])

    return forward, both


def _check_against_float64(mask: Mask, inputs: dict[str, Tensor], out: Tensor) -> None:
    """Hold one GPU's output of some queries against float64, written out."""
    seq_len, num_heads = len(inputs["q"]), inputs["q"].shape[1]
    repeats = num_heads // inputs["k"].shape[1]
    rows = np.unique(np.linspace(0, seq_len - 1, SAMPLES).astype(np.int64))
    at = torch.from_numpy(rows).cuda()
    for head in range(0, num_heads, 5):
        allowed = mask.allows(rows[:, None], np.arange(seq_len)[None], head)
        allowed = torch.from_numpy(np.broadcast_to(allowed, (len(rows), seq_len)).copy()).cuda()
        k, v = (inputs[n][:, head // repeats].double() for n in "kv")
        scores = inputs["q"][at, head].double() @ k.t() * DIM**-0.5
        want = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        found = float((out[at, head].double() - want).norm() / want.norm())
        assert found < BOUND, f"one GPU's result is off by {found:.1e} at head {head}"


def _one(report: Report, problem: Problem, name: str) -> None:
    case, size, rank = problem.case, dist.get_world_size(), dist.get_rank()
    row = {
        "mask": case.mask_name,
        "tokens": case.seq_len,
        "heads": case.group_sizes,
        "method": name,
    }
    ledger = Ledger()
    scope: Callable[[], Any] = contextlib.nullcontext
    if name in OURS:
        strategy, kind, copies = OURS[name]
        layout = make_layout(kind, problem.cu_seqlens, size)
        group = group_of_all(copies)
        positions = torch.from_numpy(layout.positions(rank)).cuda()

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(
                q, k, v, mask=problem.mask, layout=layout, group=group, strategy=strategy,
                ledger=ledger,
            )  # fmt: skip
    else:
        refusal = peers.refuse(name, case.mask_name, case.num_kv_heads)
        if refusal:
            report.note(f"{name}, {case.mask_name} {case.group_sizes}: {refusal}")
            return
        peer = peers.prepare(name, case.mask_name, problem.cu_seqlens)
        call, positions, scope = peer.call, peer.positions, peer.scope
    inputs = {n: x[positions] for n, x in problem.inputs.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        with scope():
            results = _results(call, inputs)
    except RuntimeError as failure:  # a peer that refuses; NotImplementedError is one, too
        if name in OURS:
            raise
        report.note(f"{name}, {case}: {str(failure).splitlines()[0]}")
        return
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    sent = ledger.total_bytes / 2**20 if name in OURS else None
    error = torch.tensor(
        max(
            float((results[n] - w[positions]).float().norm() / w[positions].float().norm())
            for n, w in problem.results.items()
        ),
        device="cuda",
    )
    dist.all_reduce(error, dist.ReduceOp.MAX)
    del results
    if not float(error) < BOUND:
        report.add("Attention", **row, error=float(error), remark="WRONG, not timed")
        return
    timed = []
    mine, ideal = _calls(call, inputs), _calls(problem.whole, problem.inputs)
    with scope():
        warm_up(mine[1])
        for of_mine, of_ideal in zip(mine, ideal, strict=True):
            timed.append(paired_seconds(of_mine, of_ideal, size))
    forward, both = timed
    operations = problem.operations / size / 1e12
    report.add(
        "Attention",
        **row,
        error=float(error),
        forward_tflops=operations * 2 / 7 / forward.seconds,
        both_tflops=operations / both.seconds,
        forward_of_ideal=f"{forward.of_ideal:.1%}",
        both_of_ideal=f"{both.of_ideal:.1%}",
        ideal=f"{operations * 2 / 7 / forward.ideal_s:.0f} / {operations / both.ideal_s:.0f}",
        sent_mib=sent,
        peak_gib=peak,
    )


def plot(report: Report, path: Path) -> None:
    """Bars of every method, one panel per case, with the ideal as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in report.rows.get("Attention", []) if "both_tflops" in r]
    if not rows:
        return
    panels = list(dict.fromkeys((r["mask"], r["tokens"], r["heads"]) for r in rows))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        mine = [r for r in rows if (r["mask"], r["tokens"], r["heads"]) == panel]
        labels = [r["method"] for r in mine]
        at = np.arange(len(mine))
        axis.bar(at - 0.2, [r["forward_tflops"] for r in mine], 0.4, label="forward")
        axis.bar(at + 0.2, [r["both_tflops"] for r in mine], 0.4, label="forward + backward")
        for value, colour in zip(mine[0]["ideal"].split(" / "), ("C0", "C1"), strict=True):
            axis.axhline(float(value), color=colour, linestyle=":")
        axis.set_xticks(at, labels, rotation=30, ha="right", fontsize=7)
        axis.set_title(f"{panel[0]}, {panel[1] // 1024}K, {panel[2]}", fontsize=9)
    axes[0, 0].set_ylabel("TFLOP/s per GPU; dotted: ideal")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
