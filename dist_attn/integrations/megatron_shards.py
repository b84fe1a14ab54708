"""Gradients and optimizer state divided among the ranks that hold the same share of a model.

`DistributedOptimizer` is Megatron's own, over NCCL. `ShardedOptimizer` does the same on any device
and backend, for the ranks that Megatron's cannot serve (its buffers name CUDA): CPU ranks, and
ranks that share a GPU through gloo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor, nn

from dist_attn.config import OptimizerConfig
from dist_attn.integrations.megatron_groups import MegatronGroups
from dist_attn.integrations.optimizer import make_optimizer, state_keys


@dataclass(frozen=True)
class Shard:
    """A range of one of this rank's flattened parameters, as live float32 tensors."""

    name: str
    start: int
    #: `param`, the optimizer's states, and `gradient`, each 1-d of equal length.
    tensors: dict[str, Tensor]


class Sharding(Protocol):
    """What the engine asks of either."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; add them up over the ranks after the last micro-batch."""

    def step(self, lr: float) -> float:
        """Clip, update and share the parameters; returns the norm before clipping."""

    def shards(self) -> list[Shard]:
        """What this rank holds."""

    def refresh(self, optimizer_steps: int) -> None:
        """Carry written shards over to the parameters."""

    def close(self) -> None:
        """Remove hooks."""


class ShardedOptimizer:
    """Flat float32 gradients and master weights; each rank updates an equal part of them.

    Collective: one sum of all gradients per step, one gather of all weights.

    Numerics: micro-batches and ranks add up in float32.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, groups: MegatronGroups) -> None:
        self._config = config
        self._groups = groups
        named = list(model.named_parameters())
        self._flats = [
            _Flat(part, groups.data)
            for part in (
                [x for x in named if x[1].dim() > 1],
                [x for x in named if x[1].dim() <= 1],
            )
            if part
        ]
        matrices = [f.master for f in self._flats if f.is_matrices]
        vectors = [f.master for f in self._flats if not f.is_matrices]
        device_type = self._flats[0].master.device.type
        self._optimizer = make_optimizer(matrices, vectors, config, device_type)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Sharding`."""
        loss.backward()
        if last:
            for flat in self._flats:
                flat.reduce()

    def step(self, lr: float) -> float:
        """See `Sharding`."""
        norm = self._norm()
        if not math.isfinite(norm):
            for flat in self._flats:
                flat.gradient.zero_()
            return norm
        if 0 < self._config.gradient_clipping < norm:
            for flat in self._flats:
                flat.gradient_shard.mul_(self._config.gradient_clipping / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for flat in self._flats:
            flat.master.grad = flat.gradient_shard
        self._optimizer.step()
        self._share()
        for flat in self._flats:
            flat.gradient.zero_()
        return norm

    def shards(self) -> list[Shard]:
        """See `Sharding`."""
        self._create_state()
        found = []
        for flat in self._flats:
            state = self._optimizer.state[flat.master]
            whole = {"param": flat.master, "gradient": flat.gradient_shard}
            whole |= {key: state[key] for key in state_keys(self._config)}
            found += [
                Shard(name, start, {k: t.detach()[place : place + n] for k, t in whole.items()})
                for name, start, place, n in flat.held
            ]
        return found

    def refresh(self, optimizer_steps: int) -> None:
        """See `Sharding`."""
        self._create_state()
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(optimizer_steps))
        self._share()

    def close(self) -> None:
        """See `Sharding`."""
        for flat in self._flats:
            flat.close()

    @torch.no_grad()
    def _norm(self) -> float:
        """Norm of the whole gradient; what tensor ranks repeat counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self._flats[0].master.device)
        for flat in self._flats:
            if flat.is_matrices or self._groups.tensor.rank() == 0:
                total += flat.gradient_shard.double().square().sum()
        dist.all_reduce(total, group=self._groups.data)
        dist.all_reduce(total, group=self._groups.tensor)
        return math.sqrt(float(total))

    def _share(self) -> None:
        for flat in self._flats:
            flat.share()

    def _create_state(self) -> None:
        """Create the state that torch's optimizer would create at its first step."""
        for flat in self._flats:
            state = self._optimizer.state[flat.master]
            if state_keys(self._config) and not state:
                fused = flat.master.device if self._config_is_fused else torch.device("cpu")
                state["step"] = torch.tensor(0.0, dtype=torch.float32, device=fused)
                state |= {key: torch.zeros_like(flat.master) for key in state_keys(self._config)}

    @property
    def _config_is_fused(self) -> bool:
        return bool(self._optimizer.param_groups[0].get("fused"))


class _Flat:
    """Parameters in a row: the float32 sums of their gradients, and a part of the masters."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> None:
        self.is_matrices = named[0][1].dim() > 1
        self._params = [p for _, p in named]
        self._group = group
        size, rank = group.size(), group.rank()
        numel = sum(p.numel() for p in self._params)
        part = -(-numel // size)
        first = rank * part
        device = self._params[0].device
        self.gradient = torch.zeros(part * size, dtype=torch.float32, device=device)
        weights = torch.zeros_like(self.gradient)
        self._hooks = []
        #: Name, start in the parameter, place in this rank's part, elements.
        self.held: list[tuple[str, int, int, int]] = []
        place = 0
        for name, param in named:
            n = param.numel()
            weights[place : place + n] = param.detach().flatten()
            self._hooks.append(
                param.register_post_accumulate_grad_hook(
                    _adder(self.gradient[place : place + n].view_as(param))
                )
            )
            begin, end = max(place, first), min(place + n, first + part)
            if begin < end:
                self.held.append((name, begin - place, begin - first, end - begin))
            place += n
        mine = slice(first, first + part)
        self.gradient_shard = self.gradient[mine]
        self.master = nn.Parameter(weights[mine].clone())

    def reduce(self) -> None:
        dist.all_reduce(self.gradient, group=self._group)

    @torch.no_grad()
    def share(self) -> None:
        """Give every rank all weights, in the parameters' dtype."""
        whole = torch.empty_like(self.gradient)
        dist.all_gather_into_tensor(whole, self.master.detach(), group=self._group)
        place = 0
        for param in self._params:
            param.copy_(whole[place : place + param.numel()].view_as(param))
            place += param.numel()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(param: Tensor) -> None:
        assert param.grad is not None
        total.add_(param.grad)
        param.grad = None

    return add


class DistributedOptimizer:
    """Megatron's gradient buffers and distributed optimizer."""

    def __init__(
        self, model: Any, config: OptimizerConfig, groups: MegatronGroups, bucket_elements: int
    ) -> None:
        self._config = config
        self._state_keys = state_keys(config)
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._buffers = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=groups.data.size() > 1,
                use_distributed_optimizer=True,
                bucket_size=bucket_elements,
            ),
            model,
            pg_collection=groups.collection,
        )
        self._optimizer = get_megatron_optimizer(
            _megatron_config(config, model.config),
            [self._buffers],
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )
        for group in self._optimizer.param_groups:
            # Megatron leaves this to its scheduler, of which there is none here.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        self._buffers.zero_grad_buffer()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Sharding`."""
        with nullcontext() if last else self._buffers.no_sync():
            loss.backward()
        if last:
            self._buffers.finish_grad_sync()

    def step(self, lr: float) -> float:
        """See `Sharding`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.prepare_grads()
        norm = self._optimizer.get_grad_norm()
        if math.isfinite(norm):
            self._optimizer.step()
        self._buffers.zero_grad_buffer()
        self._optimizer.zero_grad()
        return float(norm)

    def shards(self) -> list[Shard]:
        """See `Sharding`."""
        self._create_state()
        found = []
        for part in self._optimizer.chained_optimizers:
            for param in part.model_param_group_index_map:
                place = part._get_model_param_range_map(param)["param"]
                states = part._get_main_param_and_optimizer_states(param)
                gradient = param.main_grad.view(-1)[place.start : place.end]
                tensors = {k: states[k].detach().view(-1) for k in ("param", *self._state_keys)}
                tensors["gradient"] = gradient
                found.append(Shard(self._names[id(param)], place.start, tensors))
        return found

    def refresh(self, optimizer_steps: int) -> None:
        """See `Sharding`."""
        self._create_state()
        for part in self._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = optimizer_steps
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(float(optimizer_steps))
            part._copy_main_params_to_model_params()
        self._buffers.start_param_sync(force_sync=True)

    def close(self) -> None:
        """See `Sharding`."""
        self._buffers.grad_accs.clear()

    def _create_state(self) -> None:
        for part in self._optimizer.chained_optimizers:
            optimizer = part.optimizer
            for group in optimizer.param_groups:
                for main in group["params"]:
                    state = optimizer.state[main]
                    if self._state_keys and not state:
                        if isinstance(optimizer, torch.optim.AdamW):
                            state["step"] = torch.tensor(0.0, dtype=torch.float32)
                        state |= {key: torch.zeros_like(main) for key in self._state_keys}


def _megatron_config(config: OptimizerConfig, transformer: Any) -> MegatronConfig:
    return MegatronConfig(
        optimizer="adam" if config.name == "adamw" else "sgd",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        sgd_momentum=0.0,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=True,
        # Without a limit the norm would not be computed.
        clip_grad=config.gradient_clipping or math.inf,
    )
