"""The process as one rank of a run: device, process group, and agreement among ranks."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_attn.config import RunConfig
from dist_attn.errors import ConfigError, UserError
from dist_attn.training.cpus import bind_cpus
from dist_attn.training.meeting import meet
from dist_attn.training.watchdog import SETUP, Mark, watching

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """One rank of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    #: Where ranks leave each other notes beside the collectives; none in a group made elsewhere.
    store: dist.Store | None = None
    #: Every rank's node.
    nodes: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this rank logs, plans and writes what there is one of."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank. Collective: by all ranks."""
        # Else NCCL guesses the device, and says so.
        dist.barrier(device_ids=[self.device.index] if dist.get_backend() == "nccl" else None)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank. Collective: by all ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._object_device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. Collective: by all ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which input may turn out bad on some ranks only.

        A UserError of any rank becomes a UserError of every rank, so that none waits for another.
        Collective: by all ranks; the block itself must not communicate after it can fail.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        errors = [e for e in self.gather(error and (type(error), str(error))) if e]
        if errors:
            kind, text = errors[0]
            raise kind(text)

    @property
    def _object_device(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def joined(config: RunConfig) -> Iterator[tuple[Runtime, Mark]]:
    """Join the process group that torchrun or SLURM described in the environment, for a block.

    Gives this rank and the function by which it says what it is at: a watchdog ends the process
    when it does not go on for `timeout_s`.

    Raises:
        ConfigError: no such description, or the devices asked for are not there.
        NodeError: a rank did not come.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [n for n in names if n not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set: start ranks by `torchrun --nproc-per-node N "
            f"launch/train.py --cfg FILE`, by `dist-attn train --cfg FILE`, or by srun as in "
            f"launch/slurm"
        )
    rank, world_size, local_rank, local_world_size = (int(os.environ[n]) for n in names)
    device = choose_device(config.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shared = device.type == "cuda" and local_world_size > torch.cuda.device_count()
    backend = "nccl" if device.type == "cuda" and not shared else "gloo"
    store, nodes = meet(rank, world_size, config.timeout_s)
    if shared and rank == 0:
        logger.warning(
            "%d ranks share %d GPUs: communication goes through the host (gloo), for tests only",
            local_world_size,
            torch.cuda.device_count(),
        )
    if device.type == "cuda" and config.bind_cpus:
        bind_cpus(store, rank, local_rank, local_world_size, device)
    runtime = Runtime(rank, world_size, local_rank, local_world_size, device, store, tuple(nodes))
    # The watchdog, which says more, comes first.
    timeout = datetime.timedelta(seconds=1.5 * config.timeout_s)
    with watching(store, rank, runtime.nodes, config.timeout_s) as mark:
        mark(SETUP, "connecting to the others")
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        try:
            yield runtime, mark
        finally:
            dist.destroy_process_group()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank; `auto` takes a GPU where there is one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
