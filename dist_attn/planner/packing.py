"""Packing documents into groups when the time of every micro-batch is given.

Longest first: a document goes where it fits best among the open groups, or opens a group of the class
that spends the least device time on it. Short documents come last and fill what is left, each into
the emptiest group. A packing fails when a document finds no place; `solve` then gives more time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from dist_attn.planner.program import Program


@dataclass
class OpenGroup:
    """A group under construction."""

    cls: int
    micro_batch: int
    #: Node it lies in within its pool, -1 when it crosses nodes.
    time_left: float
    tokens_left: int
    documents: list[int] = field(default_factory=list)


@dataclass
class _Free:
    """Free devices of one micro-batch: per pool a count of nodes by how many devices they have free."""

    by_node: list[list[int]]
    total: list[int]

    def room(self, pool: int, degree: int, crosses: bool) -> bool:
        """Whether a group of this degree still finds its devices."""
        if pool < 0:
            return sum(self.total) >= degree
        if crosses:
            return self.total[pool] >= degree
        counts = self.by_node[pool]
        return any(counts[degree:])

    def take(self, pool: int, degree: int, crosses: bool) -> None:
        """Give a group its devices: the fullest node that fits, or the emptiest nodes."""
        if pool < 0:
            for p, available in enumerate(self.total):
                part = min(degree, available)
                if part:
                    self.take(p, part, True)
                    degree -= part
            return
        counts = self.by_node[pool]
        self.total[pool] -= degree
        if not crosses:
            size = next(s for s in range(degree, len(counts)) if counts[s])
            counts[size] -= 1
            counts[size - degree] += 1
            return
        while degree:
            size = max(s for s in range(1, len(counts)) if counts[s])
            part = min(size, degree)
            counts[size] -= 1
            counts[size - part] += 1
            degree -= part


class Packer:
    """Packs one program's documents for any micro-batch times."""

    def __init__(self, program: Program, degrees: Collection[int] | None = None) -> None:
        """Prepare the program's tables; `degrees` restricts the classes that are opened."""
        self.program = program
        classes = program.classes
        self.degree = [c.degree for c in classes]
        self.fixed = [c.fixed_s for c in classes]
        self.capacity = [c.capacity_tokens for c in classes]
        self.pool = [c.kind.pool for c in classes]
        self.crosses = [c.kind.crosses_nodes for c in classes]
        self.lengths = program.lengths.tolist()
        self.seconds = program.seconds.tolist()
        work = program.seconds * np.array(self.degree)[:, None]
        #: Classes of each document by the device time that it would take, least first.
        allowed = [c for c, d in enumerate(self.degree) if degrees is None or d in degrees]
        ranked = np.argsort(work[allowed], axis=0, kind="stable")
        self.allowed = np.array(allowed)
        self.preferred = self.allowed[ranked].T.tolist()
        self.least_work = work[allowed].min(axis=0).tolist()
        smallest = min(self.capacity[c] for c in allowed)
        self.num_long = int(np.count_nonzero(program.lengths * 4 > smallest))
        self.filler = self._filler()

    def pack(self, times: list[float]) -> list[OpenGroup] | None:
        """Place every document within these micro-batch times, or return None."""
        free = [self._free() for _ in times]
        groups: list[OpenGroup] = []
        # Short micro-batches first: a long one is left for the documents that need it.
        by_time = sorted(range(len(times)), key=lambda m: times[m])
        for i in range(self.num_long):
            group = self._best_open(groups, i) or self._open(groups, free, times, by_time, i)
            if group is None:
                return None
            self._add(group, i)
        self._open_fillers(groups, free, times)
        return groups if self._pour(groups) else None

    def _free(self) -> _Free:
        by_node = []
        for nodes in self.program.nodes:
            counts = [0] * (max(nodes) + 1)
            for size in nodes:
                counts[size] += 1
            by_node.append(counts)
        return _Free(by_node, [sum(n) for n in self.program.nodes])

    def _filler(self) -> list[int]:
        """Per pool, the class that short documents fill up with (-1: none)."""
        tokens = np.maximum(self.program.lengths[self.num_long :], 1).sum() or 1
        found = []
        for pool in range(len(self.program.nodes)):
            work = {
                c: self.degree[c] * float(self.program.seconds[c, self.num_long :].sum()) / tokens
                for c in self.allowed.tolist()
                if self.pool[c] == pool
            }
            found.append(min(work, key=lambda c: (work[c], self.degree[c])) if work else -1)
        return found

    def _best_open(self, groups: list[OpenGroup], i: int) -> OpenGroup | None:
        length = self.lengths[i]
        best, best_key = None, math.inf
        limit = 1.3 * self.least_work[i] + 1e-12
        for group in groups:
            cls = group.cls
            seconds = self.seconds[cls][i]
            left = group.time_left - seconds
            if left < 0 or group.tokens_left < length or self.degree[cls] * seconds > limit:
                continue
            key = left * self.degree[cls]
            if key < best_key:
                best, best_key = group, key
        return best

    def _open(
        self,
        groups: list[OpenGroup],
        free: list[_Free],
        times: list[float],
        by_time: list[int],
        i: int,
    ) -> OpenGroup | None:
        for cls in self.preferred[i]:
            seconds = self.seconds[cls][i]
            if seconds == math.inf:
                break
            need = self.fixed[cls] + seconds
            place = (self.pool[cls], self.degree[cls], self.crosses[cls])
            for m in by_time:
                if times[m] >= need and free[m].room(*place):
                    free[m].take(*place)
                    group = OpenGroup(cls, m, times[m] - self.fixed[cls], self.capacity[cls])
                    groups.append(group)
                    return group
        # Whatever is open, at any cost.
        for group in groups:
            if (
                group.tokens_left >= self.lengths[i]
                and group.time_left >= self.seconds[group.cls][i]
            ):
                return group
        return None

    def _open_fillers(self, groups: list[OpenGroup], free: list[_Free], times: list[float]) -> None:
        if self.num_long == len(self.lengths):
            return
        for m, time in enumerate(times):
            for cls in self.filler:
                if cls < 0 or time <= self.fixed[cls]:
                    continue
                place = (self.pool[cls], self.degree[cls], self.crosses[cls])
                while free[m].room(*place):
                    free[m].take(*place)
                    groups.append(OpenGroup(cls, m, time - self.fixed[cls], self.capacity[cls]))

    def _pour(self, groups: list[OpenGroup]) -> bool:
        """Short documents, each into the group with the most room."""
        start = self.num_long
        if start == len(self.lengths):
            return True
        short = self.program.lengths[start:]
        tokens = max(int(short.sum()), 1)
        per_token = (self.program.seconds[:, start:].sum(axis=1) / tokens).tolist()
        room = [
            min(g.tokens_left, g.time_left / per_token[g.cls] if per_token[g.cls] > 0 else math.inf)
            for g in groups
        ]
        heap = [(-r, g) for g, r in enumerate(room)]
        heapq.heapify(heap)
        for i in range(start, len(self.lengths)):
            length = self.lengths[i]
            aside = []
            while heap:
                key, index = heap[0]
                group = groups[index]
                if group.tokens_left >= length and group.time_left >= self.seconds[group.cls][i]:
                    break
                aside.append(heapq.heappop(heap))
            else:
                return False
            self._add(group, i)
            heapq.heapreplace(heap, (key + length, index))
            for item in aside:
                heapq.heappush(heap, item)
        return True

    def _add(self, group: OpenGroup, i: int) -> None:
        group.time_left -= self.seconds[group.cls][i]
        group.tokens_left -= self.lengths[i]
        group.documents.append(i)

    def micro_batch_times(self, groups: list[OpenGroup], count: int) -> list[float]:
        """Seconds of each micro-batch as packed; 0 where nothing lies."""
        times = [0.0] * count
        for group in groups:
            if group.documents:
                own = self.fixed[group.cls] + sum(
                    self.seconds[group.cls][i] for i in group.documents
                )
                times[group.micro_batch] = max(times[group.micro_batch], own)
        return times
