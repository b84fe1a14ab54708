"""Peak memory of a training step beside what the run would have said before it, on one GPU.

    tools/bench_memory.py --out DIR [--cases NAME ...] [--tokens 32768]

Every way of saving memory, by both engines, on a Llama of 0.2B parameters. Each case takes two
steps of half the tokens and two of all of them, to tell what grows with tokens from what does not.
Writes DIR/bench_memory.json; the table comes last.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from training_bench.corpus import RandomCorpus

from dist_attn.config import Config, validate
from dist_attn.data import Corpus
from dist_attn.groups import GroupPool
from dist_attn.integrations.engine import engine_factory
from dist_attn.integrations.hf import build_model
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.fitting import layer_rules_of, memory_of, planning_problem_of
from dist_attn.planner.memory import GIB
from dist_attn.planner.shape import ModelShape
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner

MODEL = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_layers": 12,
    "num_heads": 8, "num_kv_heads": 4, "loss_chunk_tokens": 2048,
}  # fmt: skip
#: For CPUs, where nothing is measured, to see that every case runs.
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_layers": 3,
    "num_heads": 4, "num_kv_heads": 2,
}  # fmt: skip
AGAIN = {"gradient_checkpointing": True}
HOST = {"offload_optimizer": True}
S2 = [{"kind": "s2", "block_tokens": 64, "local_blocks": 16, "stride_blocks": 16}]
#: What each case changes of model, engine and masks.
CASES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"engine": {"zero_stage": 1}},
    "ZeRO 2": {},
    "ZeRO 3": {"engine": {"zero_stage": 3}},
    "kernels by torch": {"model": {"kernels": "torch"}},
    "loss by torch": {"model": {"loss": "torch"}},
    "S2 masks": {"masks": S2},
    "recomputed": {"model": AGAIN},
    "recomputed with attention": {"model": {**AGAIN, "keep_attention": False}},
    "recomputed, inputs on the host": {"model": {**AGAIN, "offload_checkpoints": True}},
    "tiled MLP": {"model": {"mlp_tile_tokens": 4096}},
    "tiled MLP, recomputed": {"model": {**AGAIN, "mlp_tile_tokens": 4096}},
    "optimizer on the host": {"engine": HOST},
    "ZeRO 3, optimizer on the host": {"engine": {"zero_stage": 3, **HOST}},
    "ZeRO 3, all on the host": {"engine": {"zero_stage": 3, "offload_parameters": True, **HOST}},
    "adapters": {"model": {"lora": {"rank": 16}}},
    "Megatron": {"engine": {"name": "megatron"}},
    "Megatron, loss by torch": {"engine": {"name": "megatron"}, "model": {"loss": "torch"}},
    "Megatron, recomputed": {"engine": {"name": "megatron"}, "model": AGAIN},
    "Megatron, inputs on the host": {
        "engine": {"name": "megatron"}, "model": {**AGAIN, "offload_checkpoints": True},
    },
    "Megatron, tiled MLP": {"engine": {"name": "megatron"}, "model": {"mlp_tile_tokens": 4096}},
}  # fmt: skip


class Measured:
    """One case: its engine, and the peaks of its steps."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        #: What the cases before have left.
        self.before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        changes = CASES[name]
        model = MODEL if self.device.type == "cuda" else TINY
        engine = {"bucket_elements": 20_000_000, **changes.get("engine", {})}
        data = {
            "model": {**model, **changes.get("model", {})},
            "engine": engine,
            "attention": {"masks": changes.get("masks", [])},
            "data": {"max_document_tokens": args.tokens, "batch": {"tokens": args.tokens}},
            # What is said of the memory must not keep it from being measured.
            "planner": {"max_tokens_per_device": args.tokens},
        }
        self.config = validate(Config, data, name).on(self.device.type)
        device = "cpu"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        cluster = local_cluster(1, [device], 1)
        self.problem = planning_problem_of(self.config, cluster, model["vocab_size"])
        with self.device:
            built = build_model(self.config.model, model["vocab_size"], 1)
        self.engine = engine_factory(self.config.engine.name)(built, self.config, self.device)

    def peak(self, tokens: int) -> dict[str, Any]:
        """The second step of two of one document."""
        shape = ModelShape.from_config(self.config.model)
        corpus = cast(Corpus, RandomCorpus([tokens], shape.vocab_size))
        rules = layer_rules_of(self.config, shape)
        runtime = Runtime(0, 1, 0, 1, self.device)
        runner = StepRunner(self.engine, corpus, self.config, runtime, GroupPool(), rules)
        plan = self.problem.solve((tokens,))
        seconds = 0.0
        for _ in range(2):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            runner.accumulate(plan, np.arange(1))
            self.engine.step(1e-5)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        memory = memory_of(self.config, self.problem, shape.vocab_size)
        between = measured = 0
        if self.device.type == "cuda":
            between = torch.cuda.memory_allocated() - self.before
            measured = torch.cuda.max_memory_allocated() - self.before
        parts = {k: v / GIB for k, v in memory.parts(tokens).items()}
        return {
            "tokens": tokens, "step_s": seconds,
            "measured_gib": measured / GIB, "between_gib": between / GIB,
            "predicted_gib": memory.bytes_at(tokens) / GIB,
            "static_gib": memory.static_bytes / GIB, "parts_gib": parts,
            "left_gib": self.before / GIB,
        }  # fmt: skip

    def close(self) -> None:
        self.engine.close()


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of half the tokens and of all; none where the case fails."""
    found: list[dict[str, Any]] = []
    try:
        found = _peaks(name, args)
    except Exception:  # the other cases are worth their time
        print(f"{name}: failed\n{traceback.format_exc()[-1500:]}", flush=True)
    for _ in range(2):  # what finalizers let go of, too
        gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return found


def _peaks(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    case = Measured(name, args)
    found = [case.peak(n) for n in (args.tokens // 2, args.tokens)]
    case.close()
    return found


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # DeepSpeed reads its rank from here.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        dist.init_process_group(
            "nccl" if args.device == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous", rank=0, world_size=1,
        )  # fmt: skip
        for name in args.cases:
            if time.perf_counter() - began > args.total_seconds:
                print(f"stopped after {args.total_seconds} s; cases are left out")
                break
            rows[name] = measure(name, args)
            (args.out / "bench_memory.json").write_text(json.dumps(rows, indent=1))
        dist.destroy_process_group()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"\n{device}, torch {torch.__version__}, Python {platform.python_version()}; "
          f"{time.perf_counter() - began:.0f} s in all")  # fmt: skip
    print(table(rows))


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| case | tokens | measured GiB | predicted GiB | off by | between steps | static | "
        "KiB/token | predicted | step s |",
        "|" + "---|" * 10,
    ]
    for name, (half, full) in ((n, r) for n, r in rows.items() if r):
        grown, said = (
            (full[k] - half[k]) * 2**20 / (full["tokens"] - half["tokens"])
            for k in ("measured_gib", "predicted_gib")
        )
        off = full["predicted_gib"] / full["measured_gib"] - 1 if full["measured_gib"] else 0.0
        lines.append(
            f"| {name} | {full['tokens']:,} | {full['measured_gib']:.2f} | "
            f"{full['predicted_gib']:.2f} | {off:+.1%} | {full['between_gib']:.2f} | "
            f"{full['static_gib']:.2f} | {grown:.1f} | {said:.1f} | "
            f"{full['step_s']:.3f} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--total-seconds", type=float, default=100.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
