"""Timed forward and backward passes of a model on made-up documents."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_attn.config import Config
from dist_attn.data import LocalBatch
from dist_attn.groups import CommGroup
from dist_attn.integrations.hf import build_model
from dist_attn.layout import make_layout
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.shape import ModelShape
from dist_attn.training.contexts import local_context


@dataclass(frozen=True)
class Probed:
    """Seconds of a pass, and the bytes that it took on the device beside the parameters' own."""

    seconds: float
    peak_bytes: int


class Probe:
    """A model of the configured kind on one device, without engine and optimizer."""

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        rules: LayerRules | None,
        device: torch.device,
    ) -> None:
        # A checkpoint's sizes are in the shape, its weights do not matter.
        keys = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        sizes = {key: getattr(shape, key) for key in (*keys, "head_dim", "vocab_size")}
        sizes["tie_word_embeddings"] = shape.tie_word_embeddings
        made = config.model.model_copy(update={**sizes, "checkpoint": None})
        with device:
            self._model = build_model(made, shape.vocab_size, seed=0).to(device)
        self._vocab_size = shape.vocab_size
        self._rules = rules
        self._device = device
        self._ring_layout = config.attention.ring_layout

    def run(
        self, documents: Sequence[int], group: CommGroup, strategy: str, passes: tuple[int, int]
    ) -> Probed | None:
        """Time the pass of a group of ranks that share the documents evenly; the median counts.

        Args:
            documents: their lengths.
            group: the ranks.
            strategy: how they work together.
            passes: how many are made first, and how many are timed.

        Returns:
            None where the device's memory is too small.

        Collective: by all ranks of the group.
        """
        batch = self._batch(documents, group, strategy)
        context = local_context(batch, group, self._rules)
        batch = batch.to(self._device)
        seconds = []
        warm_ups, repeats = passes
        before = 0
        try:
            for _ in range(warm_ups + repeats):
                self._settle()
                before = self._begin_peak()
                begun = time.perf_counter()
                loss: Tensor = self._model(
                    batch.input_ids, batch.shift_labels, batch.position_ids, context
                )
                loss.backward()
                self._settle()
                seconds.append(time.perf_counter() - begun)
        except torch.cuda.OutOfMemoryError:
            del batch, context
            self.forget()
            return None
        return Probed(statistics.median(seconds[warm_ups:]), self._peak() - before)

    def forget(self) -> None:
        """Free gradients and what the device keeps for reuse."""
        self._model.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _begin_peak(self) -> int:
        """Begin to look for the peak of a pass; return the bytes that are there before."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _batch(self, documents: Sequence[int], group: CommGroup, strategy: str) -> LocalBatch:
        cu_seqlens = np.concatenate([[0], np.cumsum(documents)]).astype(np.int64)
        kind = self._ring_layout if strategy in ("ring", "gather") else "contiguous"
        layout = make_layout(kind, cu_seqlens, group.cp_size)
        stream = layout.positions(group.cp_rank)
        which = np.searchsorted(cu_seqlens, stream, side="right") - 1
        positions = stream - cu_seqlens[which]
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._vocab_size, (2, 1, len(stream)), generator=draw)
        return LocalBatch(
            input_ids=ids[0],
            shift_labels=ids[1],
            position_ids=torch.from_numpy(positions)[None],
            document_tokens=torch.from_numpy(np.diff(cu_seqlens)[which])[None],
            loss_weights=None,
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            max_seqlen=max(documents),
            layout=layout,
            cp_rank=group.cp_rank,
            strategy=strategy,
            num_padding=0,
            num_valid=len(stream),
        )
