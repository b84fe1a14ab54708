"""Training on one device: tokens/s, model FLOP utilisation, memory and time against the prediction.

    tools/bench_training.py --out DIR [--tokens 8192 32768 131072] [--masks dense s2]

A Llama of about 1.1B parameters (`--model tiny` on CPUs) takes steps of documents of equal lengths
through the parts of a real run: planner, packing, model, DeepSpeed engine. Before each step masks
are forgotten, as if its documents had other lengths. Predicted times are those of the spec sheet,
and those of a calibration made on the spot. Of some cases one more step is profiled, so that one
run tells where the time goes. FLOPs are those of the model: attention by its mask's area,
recomputation not counted. Writes DIR/bench_training.json and DIR/training.md; the table comes last.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from training_bench.corpus import RandomCorpus
from training_bench.losses import losses
from training_bench.losses import table as table_of_losses
from training_bench.predictions import Predictions
from training_bench.report import line, table

from dist_attn.config import Config, validate
from dist_attn.data import Corpus
from dist_attn.groups import GroupPool
from dist_attn.integrations.deepspeed_engine import DeepSpeedEngine
from dist_attn.integrations.hf import build_model
from dist_attn.planner.cluster import SPEC_SHEETS, local_cluster
from dist_attn.planner.fitting import layer_rules_of, memory_of, planning_problem_of
from dist_attn.planner.memory import GIB
from dist_attn.planner.plan import Plan
from dist_attn.planner.problem import PlanningProblem
from dist_attn.planner.shape import ModelShape
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner

MODELS: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 20,
        "num_heads": 16, "num_kv_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2,
    },
}  # fmt: skip
#: Every third layer sees everything before it, the others 1,024 local tokens and every 16th block.
S2_HYBRID = [
    {"kind": "s2", "block_tokens": 64, "local_blocks": 16, "stride_blocks": 16},
    {"kind": "causal", "layers": "::3"},
]
#: Kinds of kernels by name, the first that matches.
KINDS: dict[str, tuple[str, ...]] = {
    "fused layers": ("rms_norm", "swiglu", "rope"),
    "attention": (
        "sdpa",
        "fmha",
        "flash",
        "attention",
        "sparse",
        "forward_kernel",
        "dq_kernel",
        "dkv_kernel",
    ),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
    "copies": ("memcpy", "memset", "copy"),
    "softmax and loss": ("softmax", "nll", "cross_entropy", "scatter"),
}


@dataclass(frozen=True)
class Case:
    """Documents of one length under one kind of mask."""

    tokens: int
    mask: str

    @property
    def name(self) -> str:
        return f"{self.tokens // 1024}K {self.mask}"


class Bench:
    """One model and engine on one device, for all cases."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.runtime = Runtime(0, 1, 0, 1, self.device)
        self.name = "cpu"
        if self.device.type == "cuda":
            self.name = torch.cuda.get_device_name(self.device)
        self.cluster = local_cluster(1, [self.name], 1)
        self.peak_flops = SPEC_SHEETS[self.cluster.devices[0].name].peak_tflops * 1e12
        self.pool = GroupPool()
        self.predictions = Predictions(args.out, self.runtime, self.cluster)
        self.began = time.perf_counter()
        self.build(args.kernels)

    def build(self, kernels: str) -> None:
        """Make model and engine; again after a case that failed in the middle of a step."""
        args = self.args
        began = time.perf_counter()
        base = {
            "model": {**MODELS[args.model], "loss_chunk_tokens": args.loss_chunk_tokens,
                      "kernels": kernels, "loss": args.loss, "rope_theta": 500000.0},
            "engine": {"zero_stage": args.zero_stage, "bucket_elements": args.bucket_elements},
            "data": {"max_document_tokens": max(args.tokens),
                     "batch": {"tokens": max(args.batch_tokens, *args.tokens)}},
        }  # fmt: skip
        self.config = validate(Config, base, "bench").on(self.device.type)
        recomputed = {"gradient_checkpointing": True}
        with self.device:
            # Recomputation is set up here, and turned on and off by the case.
            self.model = build_model(
                self.config.model.model_copy(update=recomputed), MODELS[args.model]["vocab_size"], 1
            )
        self.num_parameters = sum(p.numel() for p in nn.Module.parameters(self.model))
        self.engine = DeepSpeedEngine(self.model, self.config, self.device)
        print(f"{self.name}: model and engine in {time.perf_counter() - began:.1f} s, kernels "
              f"'{self.config.model.kernels}', {self.config.model.dtype}", flush=True)  # fmt: skip

    def close(self) -> None:
        """Free model and engine."""
        self.engine.close()
        del self.engine, self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rebuild(self, kernels: str) -> None:
        self.close()
        self.build(kernels)

    def attempt(self, case: Case) -> dict[str, Any] | None:
        """Run a case; if it fails, once more with what is more likely to run."""
        tries: list[tuple[str, bool]] = [("", False), ("", True), ("torch", True)]
        for kernels, recompute in tries:
            if kernels and kernels == self.config.model.kernels:
                continue
            try:
                return self.run(case, recompute or self.args.always_recompute)
            except Exception:  # the other cases are worth their time
                print(f"{case.name}: failed\n{traceback.format_exc()[-3000:]}", flush=True)
            # Outside of the handler, whose traceback holds tensors.
            self.rebuild(kernels or self.config.model.kernels)
        return None

    def run(self, case: Case, always_recompute: bool) -> dict[str, Any]:
        """Time a case's steps; the first one is not counted."""
        config, problem = self.choose(case, always_recompute)
        recompute = config.model.gradient_checkpointing
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = recompute
        documents = max(1, self.args.batch_tokens // case.tokens)
        lengths = (case.tokens,) * documents
        plan = problem.solve(lengths)
        calibrated = self.calibrated(config, plan)
        runner = self.runner(config, lengths)
        seconds, phases = self.steps(runner, plan)
        flops = self.flops(problem, lengths)
        median = sorted(seconds)[len(seconds) // 2]
        row = {
            "case": case.name, "tokens": case.tokens, "mask": case.mask, "documents": documents,
            "micro_batches": len(plan.micro_batches), "recompute": recompute,
            "step_s": median, "steps_s": seconds, **phases,
            "predicted_s": plan.predicted_s, "calibrated_s": calibrated,
            "tokens_per_s": sum(lengths) / median, "mfu": flops / median / self.peak_flops,
            "model_tflop": flops / 1e12,
            "peak_gib": self.peak_gib(), **self.predicted_memory(config, problem, plan),
        }  # fmt: skip
        if case.mask == "s2":
            row["equal_streams_s"] = self.timed(runner, plan, fresh=False)[0]
        if case.name in self.args.profile:
            row["profile"] = self.profile(runner, plan, case)
        print(line(row), flush=True)
        return row

    def choose(self, case: Case, always_recompute: bool) -> tuple[Config, PlanningProblem]:
        """Keep all activations where a document then fits, else compute layers again."""
        for recompute in (False, True):
            data = self.config.model_dump()
            data["model"]["gradient_checkpointing"] = recompute
            data["attention"]["masks"] = S2_HYBRID if case.mask == "s2" else []
            config = validate(Config, data, case.name)
            vocab_size = MODELS[self.args.model]["vocab_size"]
            problem = planning_problem_of(config, self.cluster, vocab_size)
            fits = problem.cost.tokens_per_device() >= case.tokens
            if recompute or (fits and not always_recompute):
                break
        return config, problem

    def calibrated(self, config: Config, plan: Plan) -> float | None:
        """Predicted by a calibration; none where it is not wanted or time is short."""
        spent = time.perf_counter() - self.began
        if not self.args.calibrate or spent > 0.8 * self.args.total_seconds:
            return None
        seconds = self.predictions.of(config, plan)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def runner(self, config: Config, lengths: tuple[int, ...]) -> StepRunner:
        shape = ModelShape.from_config(config.model)
        rules = layer_rules_of(config, shape)
        corpus = cast(Corpus, RandomCorpus(list(lengths), shape.vocab_size))
        return StepRunner(self.engine, corpus, config, self.runtime, self.pool, rules)

    def steps(self, runner: StepRunner, plan: Plan) -> tuple[list[float], dict[str, float]]:
        self.timed(runner, plan)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        optimizer: list[float] = []
        while len(seconds) < self.args.steps and sum(seconds) < self.args.seconds_per_case:
            whole, last = self.timed(runner, plan)
            seconds.append(whole)
            optimizer.append(last)
        return seconds, {"optimizer_s": min(optimizer)}

    def timed(self, runner: StepRunner, plan: Plan, *, fresh: bool = True) -> tuple[float, float]:
        """Seconds of a step, and of its optimizer; `fresh`: as if all documents were new."""
        if fresh:
            runner.forget_streams()
        self.synchronize()
        began = time.perf_counter()
        optimizer = self.step(runner, plan)
        self.synchronize()
        return time.perf_counter() - began, optimizer

    def step(self, runner: StepRunner, plan: Plan) -> float:
        """One step; returns the seconds of the optimizer's part."""
        result = runner.accumulate(plan, np.arange(len(plan.lengths)))
        began = time.perf_counter()
        norm = self.engine.step(1e-5)
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            raise SystemExit(f"loss {result.loss}, norm {norm}: the speed of NaN is no result")
        self.synchronize()
        return time.perf_counter() - began

    def profile(self, runner: StepRunner, plan: Plan, case: Case) -> dict[str, Any]:
        """Seconds of the device by kind and by kernel, and of one step."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        runner.forget_streams()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            began = time.perf_counter()
            self.step(runner, plan)
            self.synchronize()
            wall = time.perf_counter() - began
        field = "self_device_time_total" if cuda else "self_cpu_time_total"
        times = {e.key: (getattr(e, field) / 1e6, e.count) for e in seen.key_averages()}
        kinds: dict[str, float] = {}
        for name, (spent, _) in times.items():
            kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + spent
        top = sorted(times.items(), key=lambda item: -item[1][0])[: self.args.top]
        busy = sum(kinds.values())
        print(f"--- {case.name}: {wall:.3f} s, device busy {busy:.3f} s ({busy / wall:.0%})")
        for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
            print(f"    {spent:8.4f} s {spent / wall:6.1%}  {kind}")
        for name, (spent, count) in top:
            print(f"      {spent:8.4f} s {spent / wall:6.1%} {count:6d}x  {name[:110]}")
        return {"wall_s": wall, "busy_s": busy, "kinds_s": kinds,
                "top": [(n, s, c) for n, (s, c) in top]}  # fmt: skip

    def flops(self, problem: PlanningProblem, lengths: tuple[int, ...]) -> float:
        """Of forward and backward: 6 per parameter and token, 12 per pair, head and dimension."""
        shape = problem.cost.shape
        pairs = float(problem.cost.pairs(np.array(lengths)).sum())
        heads = shape.num_layers * shape.num_heads * shape.head_dim
        return 6 * shape.matrix_parameters * sum(lengths) + 12 * heads * pairs

    def predicted_memory(
        self, config: Config, problem: PlanningProblem, plan: Plan
    ) -> dict[str, Any]:
        tokens = max(g.tokens for m in plan.micro_batches for g in m.groups)
        memory = memory_of(config, problem, problem.cost.shape.vocab_size)
        print(f"{tokens:,} tokens in the largest micro-batch: {memory.statement(tokens)}")
        parts = {name: size / GIB for name, size in memory.parts(tokens).items()}
        return {"predicted_gib": memory.bytes_at(tokens) / GIB, "predicted_parts_gib": parts}

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        # DeepSpeed reads its rank from here.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        bench = Bench(args)
        rows: list[dict[str, Any]] = []
        report = {"machine": machine(bench), "arguments": vars(args) | {"out": str(args.out)}}
        for case in (Case(t, m) for m in args.masks for t in args.tokens):
            row = bench.attempt(case)
            rows += [row] if row is not None else []
            report["cases"] = rows
            (args.out / "bench_training.json").write_text(json.dumps(report, indent=1))
            if time.perf_counter() - began > args.total_seconds:
                print(f"stopped after {args.total_seconds} s; cases are left out")
                break
        bench.close()
        report["losses"] = []
        if bench.device.type == "cuda":
            report["losses"] = losses(args.loss_chunk_tokens)
            (args.out / "bench_training.json").write_text(json.dumps(report, indent=1))
        dist.destroy_process_group()
    text = "\n".join(
        (f"{json.dumps(report['machine'])}; {time.perf_counter() - began:.0f} s in all, "
         f"{bench.predictions.seconds:.0f} s of them for calibrations", "",
         table_of_losses(report["losses"]), "", table(rows))
    )  # fmt: skip
    (args.out / "training.md").write_text(text + "\n")
    print(f"\n{text}")


def machine(bench: Bench) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()  # fmt: skip
    return {
        "device": bench.name, "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit, "parameters": bench.num_parameters,
        "peak_tflops": bench.peak_flops / 1e12,
    }  # fmt: skip


def _kind(name: str) -> str:
    lowered = name.lower()
    found = (k for k, parts in KINDS.items() if any(p in lowered for p in parts))
    return next(found, "other element by element")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", choices=sorted(MODELS), default="1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", choices=["auto", "torch", "liger"], default="auto")
    parser.add_argument("--loss", choices=["auto", "torch", "liger"], default="auto")
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, default=True,
        help="measure the costs of each kind of case first, for a second prediction",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 8192])
    parser.add_argument("--masks", nargs="+", choices=["dense", "s2"], default=["dense", "s2"])
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--loss-chunk-tokens", type=int, default=4096)
    parser.add_argument("--zero-stage", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--bucket-elements", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a case, at most")
    parser.add_argument("--seconds-per-case", type=float, default=5.0)
    parser.add_argument("--total-seconds", type=float, default=125.0)
    parser.add_argument("--always-recompute", action="store_true")
    parser.add_argument("--profile", nargs="*", default=["32K dense", "32K s2"])
    parser.add_argument("--top", type=int, default=25, help="kernels shown of a profile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
