"""Draw batches like those that FlexSP's solver was run on, for tools/bench_planner.py.

    tools/planner_batches.py --out FILE [--lengths FILE] [--seeds N] [--gpus N] [--sequences N]

For every seed, model (7B, 13B, 30B) and longest sequence (192K, 384K): one batch of a synthetic
heavy tail, and with --lengths (one length per line, `.gz` allowed) one drawn from real lengths.

Source of the constants: FlexSP (ASPLOS 2025), "Data-Centric and Heterogeneity-Adaptive Sequence
Parallelism for Efficient LLM Training", and its published profiles: seconds on A100s in nodes of 8,
all-to-all bandwidth by degree; sequences padded to twice the number of GPUs, longer ones left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

_BANDWIDTH = {"2": 119.54, "4": 104.07, "8": 96.5, "16": 10.33, "32": 5.94, "64": 4.87}
#: Per model: its costs, then the tokens of a GPU of 40 GB (30 used) by the longest sequence.
_MODELS: dict[str, tuple[dict[str, Any], dict[int, int]]] = {
    "7b": (
        {
            "hidden_size": 4096,
            "layer_num": 32,
            "act_per_token": 4.480,
            "cpt_alpha1": 5.128e-6,
            "cpt_alpha2": 0.1839576,
            "cpt_beta1": 629.3563,
        },
        {192: 6449, 384: 6407},
    ),
    "13b": (
        {
            "hidden_size": 5120,
            "layer_num": 40,
            "act_per_token": 4.220,
            "cpt_alpha1": 9.2852e-6,
            "cpt_alpha2": 0.3060189,
            "cpt_beta1": 1132.5632,
        },
        {192: 6483, 384: 6427},
    ),
    "30b": (
        {
            "hidden_size": 6656,
            "layer_num": 60,
            "act_per_token": 3.417,
            "cpt_alpha1": 15.4262e-6,
            "cpt_alpha2": 0.8035742,
            "cpt_beta1": 2789.3644,
        },
        {192: 6627, 384: 6538},
    ),
}


def main() -> None:
    """Write the batches as a JSON list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="real lengths, one per line")
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=512)
    args = parser.parse_args()
    real = None if args.lengths is None else read_lengths(args.lengths)
    records = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for number, (name, (costs, rooms)) in enumerate(_MODELS.items()):
            for limit_k, room in rooms.items():
                for kind in ("tail",) if real is None else ("wiki", "tail"):
                    source = np.random.default_rng([seed, number, limit_k, kind == "wiki"])
                    drawn = source.permutation(real) if kind == "wiki" else tail(source, args)
                    lengths = padded(drawn, limit_k, args)
                    record = {
                        "name": f"{kind}{args.gpus}_{limit_k}k_{name}",
                        "seed": seed,
                        "cluster_size": args.gpus,
                        "device_token_capacity": room,
                        "costmodel": {**costs, "alltoall_bandwidth_dict_gbs": _BANDWIDTH},
                        "lengths": lengths,
                    }
                    records.append(record)
    args.out.write_text(json.dumps(records) + "\n", encoding="utf-8")
    print(f"{len(records)} batches of {args.sequences} sequences for {args.gpus} GPUs: {args.out}")


def read_lengths(path: Path) -> np.ndarray:
    """Lengths of a file, one per line."""
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return np.array([int(n) for n in text.split()])


def tail(source: np.random.Generator, args: argparse.Namespace) -> np.ndarray:
    """Mostly lognormal lengths around 1.3K; one of thirty has a Pareto tail from 16K on."""
    count = 2 * args.sequences
    body = source.lognormal(np.log(1300), 1.3, count)
    long = 16384 * (1 + source.pareto(0.95, count))
    return np.where(source.random(count) < 0.035, long, body)


def padded(drawn: np.ndarray, limit_k: int, args: argparse.Namespace) -> list[int]:
    """The first sequences that are not too long, padded as FlexSP pads them."""
    unit = 2 * args.gpus
    lengths = np.ceil(np.maximum(drawn, 1) / unit).astype(int) * unit
    kept = lengths[lengths <= limit_k * 1024][: args.sequences]
    return [int(n) for n in kept]


if __name__ == "__main__":
    main()
