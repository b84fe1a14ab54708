"""The pool of process groups: made when a plan first needs them, kept, and bounded in number."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from dist_attn.errors import PlanError
from dist_attn.peer_memory import PeerMemory, why_no_peer_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommGroup:
    """The ranks that carry out one attention together, as one of them sees it.

    Attributes:
        ranks: global ranks, ascending.
        cp_rank: the place of the calling rank in `ranks`.
        process_group: None for a group of one rank, which never communicates.
        inner: for strategies in two levels, the ranks of the caller's node.
        outer: for strategies in two levels, the ranks at the caller's place in every node.
        peers: memory that the group's GPUs copy into, where they can; else messages are sent.
    """

    ranks: tuple[int, ...]
    cp_rank: int
    process_group: dist.ProcessGroup | None
    inner: CommGroup | None = None
    outer: CommGroup | None = None
    peers: PeerMemory | None = None

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def peer(self, cp_rank: int) -> int:
        """Global rank of the group's rank `cp_rank`, counted round the end."""
        return self.ranks[cp_rank % self.cp_size]


def single_rank_group(rank: int = 0) -> CommGroup:
    """Make the group of one rank; it needs no torch.distributed."""
    return CommGroup((rank,), 0, None)


class GroupPool:
    """At most `capacity` process groups by their ranks; the least recently used go first.

    A communicator costs memory on every device that takes part, and a planner that changes its mind
    every step would otherwise make one for every set of ranks there is. Groups of one rank and the
    group of all ranks cost nothing and do not count.
    """

    def __init__(self, capacity: int = 64, *, copy_engines: bool = True) -> None:
        """Make an empty pool.

        Args:
            capacity: process groups that it keeps at the most.
            copy_engines: let GPUs of one host copy into each other's memory, where they can.

        Raises:
            PlanError: no capacity.
        """
        if capacity < 1:
            raise PlanError(f"a pool of groups needs room for one at least, got {capacity}")
        self.capacity = capacity
        self._copy_engines = copy_engines
        self._peers: dict[tuple[int, ...], PeerMemory] = {}
        self._groups: OrderedDict[tuple[int, ...], dist.ProcessGroup] = OrderedDict()
        self._met = False

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def peer_bytes(self) -> int:
        """Memory of this rank into which other GPUs of its groups copy."""
        return sum(peers.num_bytes for peers in self._peers.values())

    def ensure(self, rank_sets: Iterable[Iterable[int]]) -> None:
        """Make the groups that are missing, after ending the least recently used ones.

        Collective:
            Every rank of the world calls it with the same sets in the same order, also the ranks
            that are in none of them.

        Raises:
            PlanError: more sets than the pool holds, or a set that is not one of ranks.
        """
        wanted = [s for s in dict.fromkeys(_checked(s) for s in rank_sets) if _counts(s)]
        if len(wanted) > self.capacity:
            raise PlanError(
                f"{len(wanted)} groups are wanted at a time but the pool holds {self.capacity}; "
                f"ensure those of one micro-batch at a time, or raise the pool's capacity"
            )
        if not self._met and dist.is_initialized():
            self._connect(tuple(range(dist.get_world_size())), dist.group.WORLD)
            self._met = True
        for ranks in wanted:
            if ranks in self._groups:
                self._groups.move_to_end(ranks)
        for ranks in wanted:
            if ranks in self._groups:
                continue
            if len(self._groups) >= self.capacity:
                self._end_oldest()
            self._groups[ranks] = dist.new_group(list(ranks), pg_options=_options())
            self._connect(ranks, self._groups[ranks])

    def get(self, ranks: Iterable[int], inner_size: int | None = None) -> CommGroup:
        """Look up the group of `ranks`, of which the calling rank must be one.

        Args:
            ranks: an ensured set of ranks.
            inner_size: cut the group into nodes of so many ranks, for strategies in two levels; the
                sets of `two_level_sets` must be ensured too.

        Raises:
            PlanError: the group was not ensured, or the caller is not in it.
        """
        ranks = _checked(ranks)
        if inner_size is not None:
            group = self.get(ranks)
            caller = group.ranks[group.cp_rank]
            inner, outer = (
                self.get(next(s for s in sets if caller in s))
                for sets in _levels(ranks, inner_size)
            )
            return replace(group, inner=inner, outer=outer)
        me = dist.get_rank() if dist.is_initialized() else 0
        if me not in ranks:
            raise PlanError(f"rank {me} asked for the group of ranks {ranks}, which it is not in")
        cp_rank = ranks.index(me)
        if len(ranks) == 1:
            return CommGroup(ranks, cp_rank, None)
        peers = self._peers.get(ranks)
        if not _counts(ranks):
            return CommGroup(ranks, cp_rank, dist.group.WORLD, peers=peers)
        if ranks not in self._groups:
            raise PlanError(f"no group of ranks {ranks}: call ensure() on every rank first")
        return CommGroup(ranks, cp_rank, self._groups[ranks], peers=peers)

    def close(self) -> None:
        """End every group of the pool; `ensure` makes them anew."""
        while self._groups:
            self._end_oldest()

    def _connect(self, ranks: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
        """Have all members of a NCCL group meet once, and find out how they exchange.

        NCCL connects at a group's first call, for which all members must be there; later, a step of
        a ring may concern some of them only.
        """
        if group is dist.GroupMember.NON_GROUP_MEMBER or group is None or len(ranks) == 1:
            return
        if dist.get_backend(group) != "nccl":
            return
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
        if self._copy_engines:
            reason = why_no_peer_memory(ranks, group)
            if reason is None:
                self._peers[ranks] = PeerMemory(group)
            elif dist.get_rank() == ranks[0]:
                logger.info("ranks %s exchange by NCCL's kernels: %s", ranks, reason)

    def _end_oldest(self) -> None:
        ranks, group = self._groups.popitem(last=False)
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            return
        if dist.get_backend(group) == "nccl":
            torch.cuda.synchronize()  # its last messages may still be under way
        self._peers.pop(ranks, None)
        dist.destroy_process_group(group)


def two_level_sets(ranks: Iterable[int], inner_size: int) -> list[tuple[int, ...]]:
    """Return the rank sets that a group needs for strategies in two levels, with its own."""
    ranks = _checked(ranks)
    inner, outer = _levels(ranks, inner_size)
    return [ranks, *inner, *outer]


def _levels(
    ranks: tuple[int, ...], inner_size: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    if inner_size < 1 or len(ranks) % inner_size:
        raise PlanError(f"nodes of {inner_size} ranks do not divide a group of {len(ranks)} ranks")
    inner = [ranks[i : i + inner_size] for i in range(0, len(ranks), inner_size)]
    return inner, [ranks[i::inner_size] for i in range(inner_size)]


def _checked(ranks: Iterable[int]) -> tuple[int, ...]:
    ranks = tuple(int(r) for r in ranks)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ascending = all(a < b for a, b in itertools.pairwise(ranks))
    if not ranks or not ascending or ranks[0] < 0 or ranks[-1] >= world_size:
        raise PlanError(
            f"a group is an ascending tuple of different ranks below {world_size}, got {ranks}"
        )
    return ranks


def _counts(ranks: tuple[int, ...]) -> bool:
    """Whether `ranks` needs a group of its own."""
    return 1 < len(ranks) < dist.get_world_size()


def _options() -> Any:
    """Options of a new group: NCCL's kernels before those that are waiting to compute."""
    if not dist.is_nccl_available() or dist.get_backend() != "nccl":
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
