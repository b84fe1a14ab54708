"""Megatron-core as an `Engine`: its GPTModel, tensor parallelism, and its distributed optimizer.

Context parallelism is ours and unknown to Megatron; every rank of the world that holds the same
share of the model is a data-parallel rank to it. Gradients are summed, not averaged: each is of
its rank's share of the step's mean loss.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention.context import AttentionContext
from dist_attn.config import Config
from dist_attn.errors import ConfigError
from dist_attn.integrations.engine import Fragment
from dist_attn.integrations.gradient_probe import GradientProbe
from dist_attn.integrations.hf import CausalLM
from dist_attn.integrations.megatron import PackedContext
from dist_attn.integrations.megatron_groups import MegatronGroups
from dist_attn.integrations.megatron_model import build_megatron_model, check_model
from dist_attn.integrations.megatron_shards import (
    DistributedOptimizer,
    Shard,
    ShardedOptimizer,
    Sharding,
)
from dist_attn.integrations.rotary import Frequencies

# It advises on CUDA's connections where there may be no CUDA; docs/megatron.md does so instead.
warnings.filterwarnings("ignore", message="When using async grad allreduce")


class MegatronEngine:
    """A model under Megatron-core, following the protocol of `integrations.engine.Engine`.

    Names, shapes and initial weights are those of the transformers model, so that checkpoints can
    be read by another engine or degree of tensor parallelism.
    """

    def __init__(self, model: CausalLM, config: Config, device: torch.device) -> None:
        degree = config.engine.tensor_parallel_degree
        check_model(model, degree)
        self._device = device
        self._groups = MegatronGroups.make(degree)
        self._model, self._map = build_megatron_model(model, config.model, self._groups, device)
        self._sharding: Sharding
        if device.type == "cuda" and dist.get_backend(self._groups.data) == "nccl":
            if config.optimizer.name != "adamw":
                raise ConfigError(
                    f"Megatron's distributed optimizer takes optimizer.name 'adamw', got "
                    f"'{config.optimizer.name}'; use that, or engine 'deepspeed'"
                )
            self._sharding = DistributedOptimizer(
                self._model, config.optimizer, self._groups, config.engine.bucket_elements
            )
        else:
            self._sharding = ShardedOptimizer(self._model, config.optimizer, self._groups)

    def forward(self, **inputs: object) -> Tensor:
        """Sum of the local token losses; see the protocol.

        Collective: by the ranks that hold one model between them.
        """
        context = inputs["attention_context"]
        assert isinstance(context, AttentionContext)
        probe = inputs.get("gradient_probe")
        with contextlib.ExitStack() as stack:
            if isinstance(probe, GradientProbe):
                stack.enter_context(probe.on(self._model.get_submodule("embedding")))
            loss: Tensor = self._model(
                inputs["input_ids"],
                inputs["position_ids"],
                None,
                labels=inputs["shift_labels"],
                loss_mask=inputs.get("loss_weights"),
                packed_seq_params=PackedContext(
                    position_ids=inputs["position_ids"],  # type: ignore[arg-type]
                    document_tokens=inputs.get("document_tokens"),  # type: ignore[arg-type]
                    attention_context=context,
                ),
            )
        return loss

    def set_rotary(self, found: Frequencies) -> None:
        """Rotate by other frequencies; see the protocol."""
        self._model.set_rotary(found)

    def backward(self, loss_sum: Tensor, valid_tokens: float, *, last: bool) -> None:
        """Accumulate gradients; see the protocol. Collective: only when `last`."""
        self._sharding.backward(loss_sum / valid_tokens, last=last)

    def step(self, lr: float) -> float:
        """Update the parameters; see the protocol."""
        return self._sharding.step(lr)

    def fragments(self) -> list[Fragment]:
        """Every fragment whose state lives on this rank; see the protocol."""
        return [f for shard in self._sharding.shards() for f in self._fragments(shard)]

    def refresh(self, optimizer_steps: int) -> None:
        """Take up written fragments; see the protocol."""
        self._sharding.refresh(optimizer_steps)

    def full_gradient(self, name: str) -> Tensor:
        """A parameter's whole gradient; see the protocol."""
        shape = self._map.shapes[name]
        whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=self._device)
        for shard in self._sharding.shards():
            for f in self._fragments(shard, keys=("gradient",)):
                if f.name == name and f.owned:
                    _write(f.tensors["gradient"], whole, f)
        dist.all_reduce(whole)
        return whole.view(shape)

    def close(self) -> None:
        """Remove hooks and end the groups. Collective: by all ranks."""
        self._sharding.close()
        self._groups.close()

    def _fragments(self, shard: Shard, keys: tuple[str, ...] = ()) -> Iterator[Fragment]:
        keys = keys or tuple(k for k in shard.tensors if k != "gradient")
        numel = shard.tensors["param"].numel()
        # Of what every tensor rank holds the first one saves.
        owned = self._map.is_divided(shard.name) or self._groups.tensor.rank() == 0
        for part in self._map.parts(shard.name, shard.start, numel):
            first = part.local_start - shard.start
            views = {k: shard.tensors[k][first : first + part.numel] for k in keys}
            yield Fragment(part.name, part.shape, part.start, views, owned, part.run)


def _write(part: Tensor, whole: Tensor, fragment: Fragment) -> None:
    """Copy a fragment's elements to where they lie in the flattened parameter."""
    run = fragment.run or part.numel()
    rows = part.numel() // run
    width = math.prod(fragment.shape[1:])
    whole.as_strided((rows, run), (width, 1), fragment.start).copy_(part.view(rows, run))
