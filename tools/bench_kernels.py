"""Times block-sparse attention against its peers; a figure is printed only behind a green check.

    PYTHONPATH=kernels:. python tools/bench_kernels.py --cases s2-128k documents-64k --json out.json

Rates count the scores that the mask keeps: 4 * head_dim operations each forward, 10 * head_dim
backward.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import block_sparse_backward, block_sparse_forward
from dist_attn_kernels.lists import BITS, BLOCK, FULL, INTERVAL, Tiles, build_lists

K = 1024


@dataclass(frozen=True)
class Case:
    """A mask at a size."""

    make: Callable[[], Tiles]
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    block: int = 128


def s2(seq_len: int, block: int, stride: int = 16) -> Case:
    """The S2 pattern of the published figures: 1024 local tokens, every 16th block."""
    return Case(
        lambda: rules.s2_tiles(
            seq_len,
            32,
            local_blocks=1024 // block,
            stride_blocks=stride,
            block=block,
            device="cuda",
        ),
        block=block,
    )


def packed(seq_len: int) -> Tiles:
    """Documents with long-tailed lengths, packed and causal."""
    gen = torch.Generator().manual_seed(7)
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        lengths.append(
            int(min(16 * K, 1500 * math.exp(1.2 * torch.randn((), generator=gen).item())))
        )
    ends = torch.tensor([0, *lengths]).cumsum(0).clamp(max=seq_len)
    bounds = rules.causal_intervals(seq_len, cu_seqlens=ends, device="cuda")
    return rules.tiles_from_intervals(bounds, seq_len)


def plain(seq_len: int, window: int = -1) -> Tiles:
    """Causal, with or without a window."""
    return rules.tiles_from_intervals(
        rules.causal_intervals(seq_len, window=window, device="cuda"), seq_len
    )


def at_random(seq_len: int, block: int, heads: int = 32) -> Tiles:
    """A tenth of the blocks, another tenth for each head."""
    generator = torch.Generator("cuda").manual_seed(3)
    return rules.random_tiles(seq_len, heads, density=0.1, block=block, generator=generator)


CASES: dict[str, Case] = {
    "s2-32k": s2(32 * K, 64),
    "s2-32k-128": s2(32 * K, 128),
    "s2-128k": s2(128 * K, 64),
    "s2-128k-128": s2(128 * K, 128),
    "documents-64k": Case(lambda: packed(64 * K), 32, 8),
    "window-128k": Case(lambda: plain(128 * K, 4096)),
    "random-32k": Case(lambda: at_random(32 * K, 64), block=64),
    "random-32k-128": Case(lambda: at_random(32 * K, 128)),
    "causal-32k": Case(lambda: plain(32 * K)),
}
CASES |= {f"s2-128k-stride{n}": s2(128 * K, 64, n) for n in (8, 32, 64, 128, 256)}


def row_mask(tiles: Tiles, head: int, row: int) -> Tensor:
    """Which keys one query of one mask head sees."""
    seen = torch.zeros(-(-tiles.k_len // BLOCK) * BLOCK, dtype=torch.bool, device="cuda")
    mine = (tiles.heads == head) & (tiles.q_blocks == row // BLOCK)
    for block, kind in zip(tiles.k_blocks[mine].tolist(), tiles.kinds[mine].tolist(), strict=True):
        key = torch.arange(block * BLOCK, block * BLOCK + BLOCK, device="cuda")
        keep = torch.ones_like(key, dtype=torch.bool)
        if kind == INTERVAL:
            assert tiles.intervals is not None
            at = tiles.intervals[head if tiles.intervals.shape[0] > 1 else 0, :, row].tolist()
            keep = (key >= at[0]) & (key < at[1])
        assert kind < BITS
        seen[key] = keep
    return seen[: tiles.k_len]


def column_mask(tiles: Tiles, head: int, key: int) -> Tensor:
    """Which queries see one key of one mask head."""
    seen = torch.zeros(-(-tiles.q_len // BLOCK) * BLOCK, dtype=torch.bool, device="cuda")
    mine = (tiles.heads == head) & (tiles.k_blocks == key // BLOCK)
    full = mine & (tiles.kinds == FULL)
    seen.view(-1, BLOCK)[tiles.q_blocks[full]] = True
    seen = seen[: tiles.q_len]
    if tiles.intervals is not None:
        at = tiles.intervals[head if tiles.intervals.shape[0] > 1 else 0]
        partial = torch.zeros(-(-tiles.q_len // BLOCK), dtype=torch.bool, device="cuda")
        partial[tiles.q_blocks[mine & (tiles.kinds == INTERVAL)]] = True
        inside = (at[0] <= key) & (key < at[1])
        seen = seen | (partial.repeat_interleave(BLOCK)[: tiles.q_len] & inside)
    return seen


def gate(tiles: Tiles, inputs: list[Tensor], results: list[Tensor], samples: int = 6) -> float:
    """The largest relative error of sampled rows of out, dq, dk and dv against float64."""
    q, k, v, dout = inputs
    out, lse, dq, dk, dv = results
    scale, group = q.shape[2] ** -0.5, q.shape[1] // k.shape[1]
    rep = q.shape[1] // tiles.num_mask_heads
    worst = 0.0
    gen = torch.Generator().manual_seed(1)
    for i in range(samples):
        head = int(torch.randint(q.shape[1], (), generator=gen))
        row = int(torch.randint(q.shape[0], (), generator=gen)) if i else q.shape[0] - 1
        kv = head // group
        mask = row_mask(tiles, head // rep, row)
        keys, values = k[mask, kv].double(), v[mask, kv].double()
        scores = keys @ q[row, head].double() * scale
        p = torch.softmax(scores, 0)
        exact = p @ values
        worst = max(worst, rel(out[row, head], exact))
        worst = max(worst, abs(float(lse[head, row]) - float(torch.logsumexp(scores, 0))))
        do = dout[row, head].double()
        ds = p * (values @ do - exact @ do)
        worst = max(worst, rel(dq[row, head], ds @ keys * scale))
    for i in range(samples):
        kv = int(torch.randint(k.shape[1], (), generator=gen))
        key = int(torch.randint(k.shape[0], (), generator=gen)) if i else 0
        want_k = torch.zeros(q.shape[2], dtype=torch.float64, device="cuda")
        want_v = want_k.clone()
        for head in range(kv * group, (kv + 1) * group):
            mask = column_mask(tiles, head // rep, key)
            qs, do = q[mask, head].double(), dout[mask, head].double()
            p = torch.exp(qs @ k[key, kv].double() * scale - lse[head, mask].double())
            ds = p * (do @ v[key, kv].double() - (do * out[mask, head].double()).sum(1))
            want_k += ds @ qs * scale
            want_v += p @ do
        worst = max(worst, rel(dk[key, kv], want_k), rel(dv[key, kv], want_v))
    return worst if math.isfinite(worst) else math.inf


def rel(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values; NaN becomes infinity."""
    value = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-12))
    return value if math.isfinite(value) else math.inf


def lists_ms(case: Case) -> float:
    """Milliseconds from a rule to the kernels' tables, on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    build_lists(case.make())
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_ms(fn: Callable[[], Any]) -> float:
    """Median of repeated runs, by device events."""
    return float(triton.testing.do_bench(fn, warmup=30, rep=150, return_mode="median"))


Peer = Callable[[Tiles, list[Tensor], Case], tuple[Callable[[], Any], Callable[[], Any]]]


def ours(backend: str) -> Peer:
    """Our kernels by backend; the second function returns all results for the check."""

    def prepare(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
        q, k, v, dout = inputs
        lists = build_lists(tiles)
        how: Any = {"backend": backend}
        out, lse = block_sparse_forward(q, k, v, lists, **how)
        return (
            lambda: block_sparse_forward(q, k, v, lists, **how),
            lambda: block_sparse_backward(dout, (q, k, v), out, lse, lists, **how),
        )

    return prepare


def flex(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
    """torch's FlexAttention, compiled, with the same blocks and the same rule inside partial."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = (t.transpose(0, 1).unsqueeze(0).detach().requires_grad_() for t in inputs[:3])
    dout = inputs[3].transpose(0, 1).unsqueeze(0)
    assert tiles.intervals is not None
    low, high = tiles.intervals[0, 0], tiles.intervals[0, 1]
    ratio = case.block // BLOCK
    num = -(-tiles.q_len // case.block)
    rows, heads = [], tiles.num_mask_heads
    for kind in (INTERVAL, FULL):
        grid = torch.zeros(heads, num, num, dtype=torch.int16, device="cuda")
        chosen = tiles.kinds == kind
        at = (tiles.heads[chosen], tiles.q_blocks[chosen] // ratio, tiles.k_blocks[chosen] // ratio)
        grid.index_put_(at, torch.ones_like(at[0], dtype=torch.int16), accumulate=True)
        rows.append(grid)
    whole = rows[1] == ratio * ratio
    some = (rows[0] + rows[1] > 0) & ~whole
    parts = []
    for mask in (some, whole):
        order = torch.argsort(mask.to(torch.int8), dim=-1, descending=True, stable=True)
        parts += [mask.sum(-1).to(torch.int32)[None], order.to(torch.int32)[None]]

    def rule(b: Any, h: Any, q_at: Any, k_at: Any) -> Any:
        return (k_at >= low[q_at]) & (k_at < high[q_at])

    mask = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=case.block, mask_mod=rule)
    run = torch.compile(flex_attention, dynamic=False)
    group = case.heads != case.kv_heads

    def call() -> Any:
        return run(q, k, v, block_mask=mask, enable_gqa=group)

    out = call()

    def backward() -> Any:
        grads = torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)
        return [g[0].transpose(0, 1) for g in grads]

    return lambda: (call().detach()[0].transpose(0, 1), None), backward


def sdpa(backend: str) -> Peer:
    """Dense causal attention of torch, a yardstick: it computes more scores than the mask keeps."""

    def prepare(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        which = SDPBackend.FLASH_ATTENTION if backend == "fa2" else SDPBackend.CUDNN_ATTENTION
        q, k, v = (t.transpose(0, 1).unsqueeze(0).detach().requires_grad_() for t in inputs[:3])
        dout = inputs[3].transpose(0, 1).unsqueeze(0)

        def forward() -> Any:
            with sdpa_kernel(which):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
                )

        out = forward()
        return forward, lambda: torch.autograd.grad(out, [q, k, v], dout, retain_graph=True)

    return prepare


def flash_packed(tiles: Tiles, inputs: list[Tensor], case: Case) -> Any:
    """torch's packed flash attention, for masks of causal documents."""
    from dist_attn_kernels.dense import FlashBackend, Saved, Segments

    q, k, v, dout = inputs
    segments, flash = Segments(cu := documents(tiles), cu, True), FlashBackend()
    scale = q.shape[2] ** -0.5
    out, lse = flash.forward(q, k, v, segments, scale)
    saved = Saved(dout, q, k, v, out, lse)
    return (
        lambda: flash.forward(q, k, v, segments, scale),
        lambda: flash.backward(saved, segments, scale, False),
    )


def documents(tiles: Tiles) -> tuple[int, ...]:
    """Boundaries of the causal documents that a mask consists of."""
    assert tiles.intervals is not None
    low, high = tiles.intervals[0, :2].cpu()
    if not torch.equal(high, torch.arange(1, tiles.q_len + 1, dtype=high.dtype)):
        raise ValueError("packed flash attention takes masks of causal documents only")
    return (*torch.unique(low).tolist(), tiles.q_len)


PEERS: dict[str, Peer] = {
    "hopper": ours("hopper"),
    "triton": ours("triton"),
    "flex": flex,
    "fa2-packed": flash_packed,
    "fa2-dense": sdpa("fa2"),
    "cudnn-dense": sdpa("cudnn"),
}


def measure(name: str, peer: str) -> dict[str, Any]:
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
        ms = time_ms(fn)
        row |= {f"{part}_ms": ms, f"{part}_tflops": factor * flops / ms / 1e9}
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


def tried(name: str, peer: str) -> dict[str, Any]:
    """A row, or what went wrong; printed either way."""
    try:
        row = measure(name, peer)
    except Exception as problem:
        row = {"case": name, "peer": peer, "problem": f"{type(problem).__name__}: {problem}"[:300]}
    torch.cuda.empty_cache()
    said = row.get("problem", f"RED: error {row.get('error')}")
    if "forward_ms" in row:
        said = (
            f"{row['density']:8.4f} {row.get('error', 0):8.1e} "
            f"{row['forward_ms']:8.2f} {row['forward_tflops']:6.0f} "
            f"{row['backward_ms']:8.2f} {row['backward_tflops']:6.0f} {row.get('lists_ms', 0):6.1f}"
        )
    print(f"{name:18} {peer:12} {said}", flush=True)
    return row


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:9], choices=list(CASES))
    parser.add_argument("--peers", nargs="+", default=["hopper", "triton"], choices=list(PEERS))
    parser.add_argument("--also", nargs="+", default=[], metavar="CASE:PEER", help="pairs beside")
    parser.add_argument("--json", help="write every figure here")
    args = parser.parse_args()
    about, rows = describe(), []
    print(about)
    print(
        f"{'case':18} {'peer':12} {'density':>8} {'error':>8} "
        f"{'fwd ms':>8} {'TF/s':>6} {'bwd ms':>8} {'TF/s':>6} {'lists':>6}"
    )
    pairs = [(name, peer) for name in args.cases for peer in args.peers]
    for name, peer in pairs + [tuple(pair.split(":")) for pair in args.also]:
        rows.append(tried(name, peer))
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
