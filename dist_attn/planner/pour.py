"""Short documents into the groups that the long ones left, one by one."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_attn.planner.fluid import Fluid, Groups, OpenGroup
from dist_attn.planner.search import Arrangement

#: Where memory is the limit, time is left for at least so many times the tokens; both are tried.
_SLACKS = (1.0, 1.1)


@dataclass(slots=True)
class Vessel:
    """A group with room: seconds and tokens that are left."""

    group: OpenGroup
    seconds_left: float
    tokens_left: int


def pour(fluid: Fluid, arrangement: Arrangement, steps: int = 7) -> list[Groups]:
    """Complete an arrangement; times are stretched as little as the short documents allow.

    The fluid times are multiplied by the least factor, found by bisection, at which every short
    document finds a place. Where even doubled times do not suffice, micro-batches are added.
    """
    times = list(arrangement.score.times)
    batches = list(arrangement.batches)
    found = None
    while found is None:
        found = _fill(fluid, batches, times, 2.0, 1.0)
        if found is None:
            batches.append([])
            times.append(max(times))
            assert len(batches) <= 2 * len(fluid.lengths), "an empty micro-batch holds any document"
    high = 1.0
    for slack in _SLACKS:
        low = 0.0
        for _ in range(steps):
            # Shortfalls are mostly well below a hundredth: bisect on a scale that is fine there.
            middle = (low + high) / 2
            trial = _fill(fluid, batches, times, 1 + middle**3, slack)
            if trial is None:
                low = middle
            else:
                found, high = trial, middle
    return found


def batch_times(fluid: Fluid, batches: list[Groups]) -> list[float]:
    """Seconds of each micro-batch."""
    return [max((fluid.fixed[g.cls] + g.seconds for g in b), default=0.0) for b in batches]


def _fill(
    fluid: Fluid, batches: list[Groups], times: list[float], factor: float, slack: float
) -> list[Groups] | None:
    """Place every short document within stretched times, or return None.

    Longest first. Groups that memory limits (their time would hold `slack` times the tokens) are
    filled first: there a long document's extra seconds cost nothing, while the shortest documents
    go where time is what counts.
    """
    filled: list[Groups] = []
    vessels: list[Vessel] = []
    for groups, time_s in zip(batches, times, strict=True):
        own = [OpenGroup(g.cls, g.seconds, g.tokens, list(g.documents)) for g in groups]
        filled.append(own)
        _open_fillers(fluid, own)
        limit = time_s * factor
        for group in own:
            left = limit - fluid.fixed[group.cls] - group.seconds
            if left >= 0:
                room = fluid.capacity[group.cls] - group.tokens
                vessels.append(Vessel(group, left, room))
    short = range(fluid.num_long, len(fluid.lengths))
    if distribute(fluid, vessels, slack, short) is None:
        return None
    return [[g for g in groups if g.documents] for groups in filled]


def _open_fillers(fluid: Fluid, groups: Groups) -> None:
    free = fluid.free_devices(groups)
    assert free is not None, "arrangements are feasible"
    for filler, devices in zip(fluid.fillers, free, strict=True):
        if filler >= 0:
            for _ in range(devices // fluid.degree[filler]):
                groups.append(OpenGroup(filler, 0.0, 0))


def distribute(
    fluid: Fluid,
    vessels: list[Vessel],
    slack: float,
    documents: Sequence[int],
    most_unplaced: int = 0,
) -> list[int] | None:
    """Place documents, longest first; returns those without a place, None when too many."""
    by_tokens: list[tuple[float, int]] = []
    by_time: list[tuple[float, int]] = []
    for v, vessel in enumerate(vessels):
        rate = fluid.rate[vessel.group.cls]
        reach = vessel.seconds_left / rate if rate > 0 else math.inf
        if vessel.tokens_left * slack <= reach:
            by_tokens.append((-vessel.tokens_left, v))
        else:
            by_time.append((-reach, v))
    heapq.heapify(by_tokens)
    heapq.heapify(by_time)
    unplaced: list[int] = []
    for i in documents:
        if not (
            _put(fluid, vessels, by_tokens, i, False) or _put(fluid, vessels, by_time, i, True)
        ):
            unplaced.append(i)
            if len(unplaced) > most_unplaced:
                return None
    return unplaced


def _put(
    fluid: Fluid, vessels: list[Vessel], heap: list[tuple[float, int]], i: int, timed: bool
) -> bool:
    """Into the roomiest vessel that takes the document; `timed`: room is seconds, else tokens."""
    length, seconds = fluid.lengths[i], fluid.seconds[i]
    aside: list[tuple[float, int]] = []
    placed = False
    while heap and len(aside) < 8:
        key, v = heap[0]
        vessel = vessels[v]
        cls = vessel.group.cls
        if vessel.tokens_left >= length and vessel.seconds_left >= seconds[cls]:
            vessel.tokens_left -= length
            vessel.seconds_left -= seconds[cls]
            vessel.group.tokens += length
            vessel.group.seconds += seconds[cls]
            vessel.group.documents.append(i)
            heapq.heapreplace(
                heap, (key + (seconds[cls] / fluid.rate[cls] if timed else length), v)
            )
            placed = True
            break
        if -key < length and not timed:
            break
        aside.append(heapq.heappop(heap))
    for item in aside:
        heapq.heappush(heap, item)
    return placed
