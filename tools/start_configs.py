"""Start the shipped configurations at their real widths and lengths on one GPU, for a few steps.

    tools/start_configs.py --out DIR [--configs 32k 128k ...]

Each takes its own file but for what one GPU cannot hold: fewer layers, a smaller vocabulary, the
batch of one or two documents, and of 1m.yaml the stages up to 256K tokens. Documents are random
words. All runs share one process. Writes DIR/start_configs.json; the table comes last.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_attn.config import load_config
from dist_attn.training.loop import run_training
from dist_attn.training.run_folder import read_metrics
from dist_attn.training.runtime import Runtime

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
#: Of a model of 8B two layers.
TWO_LAYERS = ["model.num_layers=2", "model.vocab_size=32000"]
STAGES = [
    {"max_document_tokens": 4096, "steps": 1},
    {"max_document_tokens": 32768, "steps": 1, "rope": {"rope_theta": 1e6}},
    {"max_document_tokens": 131072, "steps": 1, "rope": {"rope_theta": 1e7}},
    {"max_document_tokens": 262144, "rope": {"rope_theta": 2.5e7}},
]
#: What is set in each file.
CHANGES: dict[str, list[str]] = {
    "32k": ["data.batch.tokens=65536", "run.steps=2"],
    "128k": [*TWO_LAYERS, "data.batch.tokens=131072", "run.steps=2"],
    "s2_128k": [*TWO_LAYERS, "data.batch.tokens=131072", "run.steps=2"],
    "megatron_128k": [
        *TWO_LAYERS, "data.batch.tokens=131072", "run.steps=2", "engine.tensor_parallel_degree=1",
    ],
    "continue_llama_128k": ["data.batch.tokens=131072", "run.steps=2"],
    "1m": [
        *TWO_LAYERS, "data.batch.tokens=262144", "run.steps=4", f"stages={json.dumps(STAGES)}",
    ],
}  # fmt: skip
EVERYWHERE = [
    "cluster=auto", "data.tokenizer=bytes", "checkpoint.at_end=false", "checkpoint.every_steps=0",
    "logging.tensorboard=false", "logging.progress_bar=false",
    "logging.plan_picture_every_steps=0",
]  # fmt: skip


def corpus(folder: Path) -> Path:
    """Documents of 300 KB, of words drawn at random."""
    draw = np.random.default_rng(0)
    words = np.array(["".join(draw.choice(list("abcdefgh"), 6)) for _ in range(500)])
    path = folder / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(16):
            text = " ".join(draw.choice(words, 43_000))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def llama(folder: Path) -> Path:
    """A checkpoint of transformers, of the widths of an 8B."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def start(name: str, folder: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """Metrics of the steps of one configuration."""
    path = folder / "corpus.jsonl"
    read = {"kind": "jsonl", "path": str(path)}
    settings = [*EVERYWHERE, *CHANGES[name], f"run.dir={folder / name}"]
    if name == "1m":
        sources = [{"name": n, "corpus": read, "loss_weight": w}
                   for n, w in (("books", 1.0), ("code", 0.5))]  # fmt: skip
        settings.append(f"data.sources={json.dumps(sources)}")
    else:
        settings.append(f"data.corpus={json.dumps(read)}")
    if name == "continue_llama_128k":
        settings.append(f"model.checkpoint={llama(folder / 'llama')}")
    config = load_config(CONFIGS / f"{name}.yaml", settings).on(runtime.device.type)
    run_training(config, None, runtime)
    return read_metrics(folder / name / "metrics.jsonl")


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # DeepSpeed reads its rank from here.
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        torch.cuda.set_device(0)
        dist.init_process_group(
            "nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        runtime = Runtime(0, 1, 0, 1, torch.device("cuda", 0))
        corpus(folder)
        for config in args.configs:
            if time.perf_counter() - began > args.total_seconds:
                print(f"stopped after {args.total_seconds} s; configurations are left out")
                break
            print(f"--- {config}", flush=True)
            try:
                rows[config] = start(config, folder, runtime)
            except Exception:  # the others are worth their time
                print(f"{config}: failed\n{traceback.format_exc()[-2500:]}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"--- {time.perf_counter() - began:.0f} s", flush=True)
            (args.out / "start_configs.json").write_text(json.dumps(rows, indent=1))
        dist.destroy_process_group()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; "
          f"{time.perf_counter() - began:.0f} s in all")  # fmt: skip
    print(table(rows))


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| configuration | step | tokens | loss | s | predicted s | GiB | predicted GiB |",
             "|" + "---|" * 8]  # fmt: skip
    for name, steps in rows.items():
        lines += [
            f"| {name} | {s['step']} | {s['tokens']:,} | {s['loss']:.3f} | {s['step_s']:.2f} | "
            f"{s['predicted_s']:.2f} | {s['memory_gib']:.1f} | {s['predicted_memory_gib']:.1f} |"
            for s in steps
        ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--configs", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--total-seconds", type=float, default=110.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
