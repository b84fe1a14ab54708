"""DeepSpeed ZeRO 0 to 3 as an `Engine`.

DeepSpeed knows nothing of sequence parallelism here: it shards over all ranks and averages over all
ranks. What makes the gradients those of the whole step is the scale in `backward`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from dist_attn.attention.context import AttentionContext
from dist_attn.comm.ledger import Ledger, waiting
from dist_attn.config import Config, OptimizerConfig
from dist_attn.integrations.engine import Fragment
from dist_attn.integrations.gradient_probe import GradientProbe
from dist_attn.integrations.optimizer import make_optimizer, state_keys
from dist_attn.integrations.rotary import Frequencies


class DeepSpeedEngine:
    """A model under DeepSpeed, following the protocol of `integrations.engine.Engine`."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device) -> None:
        _prepare_deepspeed(device)
        self._world_size = dist.get_world_size()
        self._rank = dist.get_rank()
        self._stage = int(config.engine.zero_stage)
        model.to(device)
        # Frozen parameters have no state and are in no checkpoint.
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: tuple(p.shape) for name, p in self._params.items()}
        self._state_keys = state_keys(config.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optimizer, device),
            config=_deepspeed_config(config, device),
            dist_init_required=False,
        )
        #: Of the forward pass that runs.
        self._ledger: Ledger | None = None
        if self._stage == 3:
            self._time_fetches()

    def forward(self, **inputs: object) -> Tensor:
        """Run the model; see the protocol."""
        context = inputs.get("attention_context")
        self._ledger = context.ledger if isinstance(context, AttentionContext) else None
        probe = inputs.pop("gradient_probe", None)
        with contextlib.ExitStack() as stack:
            if isinstance(probe, GradientProbe):
                embedding = self._engine.module.get_submodule("model.embed_tokens")
                stack.enter_context(probe.on(embedding))
            loss: Tensor = self._engine(**inputs)
        self._ledger = None
        return loss

    def set_rotary(self, found: Frequencies) -> None:
        """Rotate by other frequencies; see the protocol."""
        self._engine.module.model.rotary_emb.frequencies = found

    def _time_fetches(self) -> None:
        """Let gathering a layer's weights count as waiting, in the forward pass."""
        coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def fetch_and_time(*args: Any, **kwargs: Any) -> None:
            with waiting(self._ledger):
                fetch(*args, **kwargs)

        coordinator.fetch_sub_module = fetch_and_time

    def backward(self, loss_sum: Tensor, valid_tokens: float, *, last: bool) -> None:
        """Backward of this rank's share of the step's mean loss; see the protocol."""
        # DeepSpeed averages over the ranks; the loss is a sum over them.
        scaled = loss_sum * (self._world_size / valid_tokens)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(scaled, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self, lr: float) -> float:
        """Update the parameters; see the protocol."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            # DeepSpeed neither looks at these gradients nor tells their norm.
            norm = self._norm_of_whole_gradients()
            if math.isfinite(norm):
                self._engine.step()
            self._engine.module.zero_grad()
            return norm
        self._engine.step()
        # ZeRO leaves such a step out by itself, and tells the norm of the one before.
        if self._engine.optimizer.overflow:
            return float("nan")
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _norm_of_whole_gradients(self) -> float:
        """Norm of the reduced gradients, which every rank holds whole at stage 0."""
        gradients = [p.grad for p in self._params.values() if p.grad is not None]
        return float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())

    def full_gradient(self, name: str) -> Tensor:
        """A parameter's whole gradient; see the protocol."""
        gradient = safe_get_full_grad(self._params[name])
        return gradient.float().reshape(self._shapes[name])

    def fragments(self) -> list[Fragment]:
        """Every fragment whose state lives on this rank; see the protocol."""
        self._create_optimizer_state()
        match self._stage:
            case 0:
                return list(self._replicated_fragments())
            case 3:
                return list(self._partitioned_fragments())
            case _:
                return list(self._linked_fragments())

    def refresh(self, optimizer_steps: int) -> None:
        """Take up written fragments; see the protocol."""
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], float(optimizer_steps))
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                # What is kept whole on every rank still shows the old weights.
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self._engine.destroy()

    def _master_weights(self) -> list[Tensor]:
        zero = self._engine.optimizer
        if self._stage == 0:
            return list(self._params.values())
        if self._stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        flat = getattr(zero, "single_partition_of_fp32_groups", None)
        return list(zero.fp32_groups_flat_partition if flat is None else flat)

    def _create_optimizer_state(self) -> None:
        """Create the state that torch's optimizer would create at its first step."""
        state = self._engine.basic_optimizer.state
        for master in self._master_weights():
            if self._state_keys and not state[master]:
                state[master]["step"] = torch.tensor(0.0, dtype=torch.float32)
                if self._engine.basic_optimizer.param_groups[0].get("fused"):
                    state[master]["step"] = state[master]["step"].to(master.device)
                for key in self._state_keys:
                    state[master][key] = torch.zeros_like(master)

    def _views(self, master: Tensor, start: int, numel: int) -> dict[str, Tensor]:
        state = self._engine.basic_optimizer.state
        whole = {"param": master} | {key: state[master][key] for key in self._state_keys}
        return {
            key: tensor.detach().view(-1).narrow(0, start, numel) for key, tensor in whole.items()
        }

    def _replicated_fragments(self) -> Iterator[Fragment]:
        for index, (name, param) in enumerate(self._params.items()):
            owned = index % self._world_size == self._rank
            yield Fragment(name, self._shapes[name], 0, self._views(param, 0, param.numel()), owned)

    def _linked_fragments(self) -> Iterator[Fragment]:
        masters = self._master_weights()
        for name, param in self._params.items():
            link = param._hp_mapping  # type: ignore[attr-defined]
            if link is None:
                continue
            place = link.get_hp_fragment_address()
            views = self._views(masters[link.param_group_index], place.start, place.numel)
            yield Fragment(
                name, self._shapes[name], link.lp_fragment_address.start, views, owned=True
            )

    def _partitioned_fragments(self) -> Iterator[Fragment]:
        zero = self._engine.optimizer
        for name, param in self._params.items():
            group, offset, partition = zero.grad_position[zero.get_param_id(param)]
            start = partition * zero._get_param_partition_rank(param)
            # The last partitions are filled up with padding, which is nobody's.
            numel = min(partition, param.ds_numel - start)  # type: ignore[attr-defined]
            if numel > 0:
                master = zero.fp32_partitioned_groups_flat[group]
                views = self._views(master, offset, numel)
                yield Fragment(name, self._shapes[name], start, views, owned=True)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The configured torch optimizer over a model's parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.dim() > 1]
    vectors = [p for p in params if p.dim() <= 1]
    return make_optimizer(matrices, vectors, config, device.type)


def _deepspeed_config(config: Config, device: torch.device) -> dict[str, Any]:
    bucket = config.engine.bucket_elements
    stage = ZeroStageEnum(config.engine.zero_stage)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        # torch's optimizer runs on the host as well; DeepSpeed's own would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.model.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": int(stage),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "contiguous_gradients": True,
            # With it DeepSpeed waits for the device after every backward, for nothing on one rank.
            "overlap_comm": device.type == "cuda" and dist.get_world_size() > 1,
            **_offload(config, device),
        },
    }


def _offload(config: Config, device: torch.device) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    wanted = {
        "offload_optimizer": config.engine.offload_optimizer,
        "offload_param": config.engine.offload_parameters,
    }
    return {key: host for key, on in wanted.items() if on}


def _prepare_deepspeed(device: torch.device) -> None:
    """Choose the accelerator and the device, and keep DeepSpeed from compiling C++ for CPU ranks.

    Its shared-memory collectives would take a minute and a half to build before the first step.
    It takes LOCAL_RANK for the number of the device, in every step: where ranks share one, it is
    not, and has to become that.
    """
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    if get_accelerator().device_name() != device.type:
        set_accelerator(CPU_Accelerator() if device.type == "cpu" else CUDA_Accelerator())
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.WARNING)
    backend = dist.get_backend()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
