"""Process groups of a Megatron model: tensor neighbours, and ranks that hold the same share."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class MegatronGroups:
    """The groups of one rank, named explicitly: Megatron's global `parallel_state` is not used.

    Attributes:
        tensor: the ranks that hold one model between them.
        data: the ranks that hold the same share of it; they divide optimizer state and tokens.
        alone: this rank, for the kinds of parallelism that are not used.
    """

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    alone: dist.ProcessGroup

    @classmethod
    def make(cls, tensor_parallel_degree: int) -> MegatronGroups:
        """Make them. Collective: by all ranks of the world."""
        world_size, rank, degree = dist.get_world_size(), dist.get_rank(), tensor_parallel_degree
        assert world_size % degree == 0
        alone = dist.new_group([rank], use_local_synchronization=True)
        tensor = data = None
        if degree == 1:
            tensor = alone
        else:
            for first in range(0, world_size, degree):
                group = dist.new_group(list(range(first, first + degree)))
                tensor = group if first <= rank < first + degree else tensor
        if degree == world_size:
            data = alone
        else:
            for place in range(degree):
                group = dist.new_group(list(range(place, world_size, degree)))
                data = group if rank % degree == place else data
        assert tensor is not None
        assert data is not None
        return cls(tensor, data, alone)

    @property
    def collection(self) -> ProcessGroupCollection:
        """As Megatron's modules, gradient buffers and optimizers take them."""
        one = self.alone
        return ProcessGroupCollection(
            tp=self.tensor, mp=self.tensor, tp_cp=self.tensor,
            dp=self.data, dp_cp=self.data, intra_dp_cp=self.data,
            tp_dp_cp=dist.group.WORLD, intra_dist_opt=dist.group.WORLD,
            pp=one, cp=one, ep=one, expt_tp=one, tp_ep=one, tp_ep_pp=one,
            expt_dp=self.data, intra_expt_dp=self.data,
            embd=None, pos_embd=None, inter_dist_opt=None,
        )  # fmt: skip

    def close(self) -> None:
        """End the groups. Collective: by all ranks."""
        for group in {id(g): g for g in (self.tensor, self.data, self.alone)}.values():
            dist.destroy_process_group(group)
