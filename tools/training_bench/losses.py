"""Liger's loss beside ours: seconds, memory and errors of forward and backward."""

from __future__ import annotations

import time
from typing import Any

import torch

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.loss import loss_function

#: Tokens, hidden size, vocabulary.
SHAPES = ((32768, 2048, 32000), (16384, 4096, 128256))


def losses(chunk_tokens: int) -> list[dict[str, Any]]:
    """Of each shape both; nothing where Liger is not installed."""
    rows = []
    for tokens, hidden_size, vocab_size in SHAPES:
        for kind in ("torch", "liger"):
            model = ModelConfig(loss=kind, loss_chunk_tokens=chunk_tokens)
            try:
                function = loss_function(model)
            except ConfigError as error:
                print(f"loss by {kind}: {error}")
                continue
            g = torch.Generator("cuda").manual_seed(0)
            made = [
                (0.02 * torch.randn(n, hidden_size, device="cuda", generator=g)).bfloat16()
                for n in (tokens, vocab_size)
            ]
            hidden, weight = (x.requires_grad_() for x in made)
            labels = torch.randint(0, vocab_size, (tokens,), device="cuda", generator=g)
            seconds = []
            for _ in range(3):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                began = time.perf_counter()
                (function(hidden, weight, labels, None) * (1 / tokens)).backward()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                peak = torch.cuda.max_memory_allocated() - before
                hidden.grad = weight.grad = None
            rows.append(
                {"tokens": tokens, "hidden": hidden_size, "vocabulary": vocab_size, "loss": kind,
                 "ms": 1e3 * min(seconds[1:]), "peak_gib": peak / 2**30}
            )  # fmt: skip
            del hidden, weight, labels, made
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| tokens | hidden | vocabulary | loss | ms | peak GiB |", "|" + "---|" * 6]
    lines += [
        f"| {r['tokens']:,} | {r['hidden']:,} | {r['vocabulary']:,} | {r['loss']} | {r['ms']:.1f} "
        f"| {r['peak_gib']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)
