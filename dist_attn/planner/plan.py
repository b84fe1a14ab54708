"""A plan as data: micro-batches of groups of ranks, each with its documents.

With `groups` placement the groups of a micro-batch have disjoint ranks and share each document
evenly. With `free` placement a rank may be in several groups, which it works on in the order in
which the micro-batch lists them; shares are uneven, and what counts is each rank's sum.

A plan prints, hashes, and goes through JSON unchanged; every rank compares its digest before a
step.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_attn.errors import PlanError

PLAN_VERSION = 1
_MODES = {"synchronisation": ("micro_batch", "step"), "placement": ("groups", "free")}


@dataclass(frozen=True)
class Group:
    """Ranks that share the tokens of some documents in one micro-batch."""

    ranks: tuple[int, ...]
    #: `local` for one rank, else how attention is carried out among the ranks.
    strategy: str
    #: Indices into the plan's lengths, ascending.
    documents: tuple[int, ...]
    tokens: int
    #: Fixed cost, computation, and communication that computation does not hide.
    overhead_s: float
    compute_s: float
    communication_s: float
    #: The fullest rank.
    memory_bytes: int
    #: `free` placement: the tokens of each document on each rank. Empty: evenly on all ranks.
    shares: tuple[tuple[int, ...], ...] = ()
    #: `free` placement: seconds of each rank, without the micro-batch's own; the times above are
    #: those of the rank that takes longest.
    rank_s: tuple[float, ...] = ()

    @property
    def degree(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def time_s(self) -> float:
        """Predicted seconds, forward and backward."""
        return self.overhead_s + self.compute_s + self.communication_s


@dataclass(frozen=True)
class MicroBatch:
    """Groups that run at the same time; a rank in no group idles."""

    groups: tuple[Group, ...]
    #: `free` placement: what every rank pays once, beside its groups.
    overhead_s: float = 0.0

    @property
    def time_s(self) -> float:
        """Predicted seconds of the slowest group, or with `free` placement of the slowest rank."""
        if self.groups[0].rank_s:
            return self.overhead_s + max(self.seconds_of_ranks().values())
        return max(g.time_s for g in self.groups)

    def seconds_of_ranks(self) -> dict[int, float]:
        """With `free` placement, each working rank's seconds in all of its groups."""
        seconds: dict[int, float] = {}
        for group in self.groups:
            for rank, own in zip(group.ranks, group.rank_s, strict=True):
                seconds[rank] = seconds.get(rank, 0.0) + own
        return seconds


@dataclass(frozen=True)
class SolverReport:
    """How a plan came about; the only part that is not the same on every run is `seconds`."""

    method: str
    seconds: float = 0.0
    #: Linear programs solved, and steps of the search.
    programs: int = 0
    steps: int = 0
    #: The clock, not the work limit, ended the search, so that another run may end elsewhere.
    time_limit_reached: bool = False


@dataclass(frozen=True)
class Plan:
    """How one global batch is scattered over the ranks."""

    lengths: tuple[int, ...]
    world_size: int
    micro_batches: tuple[MicroBatch, ...]
    predicted_s: float
    #: No plan under the same rules and cost model takes less.
    lower_bound_s: float
    solver: SolverReport
    cluster_fingerprint: str
    cost_fingerprint: str
    #: `micro_batch`: all ranks wait at each micro-batch. `step`: only at the optimizer step; then
    #: the predicted time is when the last rank ends, and micro-batches only order each rank's
    #: groups.
    synchronisation: str = "micro_batch"
    #: `groups` or `free`; see the module.
    placement: str = "groups"
    version: int = PLAN_VERSION

    @property
    def gap(self) -> float:
        """How far the predicted time is above the lower bound, relative to the bound."""
        if self.lower_bound_s <= 0:
            return 0.0
        return self.predicted_s / self.lower_bound_s - 1.0

    def digest(self) -> str:
        """SHA-256 of the decisions: equal on two ranks if and only if they run the same plan."""
        decisions = {
            "version": self.version,
            "lengths": self.lengths,
            "world_size": self.world_size,
            "synchronisation": self.synchronisation,
            "placement": self.placement,
            "micro_batches": [
                [(g.ranks, g.strategy, g.documents, g.shares) for g in m.groups]
                for m in self.micro_batches
            ],
        }
        text = json.dumps(decisions, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        return json.dumps({"format": "dist_attn plan", **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(
        cls,
        text: str,
        *,
        source: str = "plan",
        cluster_fingerprint: str | None = None,
        world_size: int | None = None,
    ) -> Plan:
        """Read and validate what `to_json` wrote.

        Args:
            text: the JSON text.
            source: what an error names, such as the file.
            cluster_fingerprint: the cluster that the plan must have been made for.
            world_size: the number of ranks that the plan must have been made for.

        Raises:
            PlanError: not a plan, damaged, of another version, cluster or world size.
        """
        data = _mapping(text, source)
        if data.pop("version") != PLAN_VERSION:
            raise PlanError(
                f"{source}: plan version {json.loads(text)['version']!r} cannot be read, only "
                f"version {PLAN_VERSION}; make the plan again"
            )
        try:
            plan = _build(data)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{source}: a damaged plan ({error}); make the plan again") from None
        plan.validate(source)
        if world_size is not None and plan.world_size != world_size:
            raise PlanError(
                f"{source}: the plan is for {plan.world_size} ranks, {world_size} run; "
                f"make it again for {world_size} ranks"
            )
        if cluster_fingerprint is not None and plan.cluster_fingerprint != cluster_fingerprint:
            raise PlanError(
                f"{source}: the plan was made for another cluster (fingerprint "
                f"{plan.cluster_fingerprint}, here {cluster_fingerprint}); make it again for this "
                f"one"
            )
        return plan

    def validate(self, source: str = "plan") -> None:
        """Raise PlanError unless every document lies in one group and ranks are as they must be."""
        for name, allowed in _MODES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"{source}: {name} is {' or '.join(map(repr, allowed))}, got "
                    f"{getattr(self, name)!r}; make the plan again"
                )
        seen: list[int] = []
        for m, micro_batch in enumerate(self.micro_batches):
            sets = [g.ranks for g in micro_batch.groups]
            if self.placement == "groups":
                sets = [tuple(r for ranks in sets for r in ranks)]
            if not all(_are_ranks(ranks, self.world_size) for ranks in sets):
                raise PlanError(
                    f"{source}: micro-batch {m} uses a rank twice or a rank outside "
                    f"0..{self.world_size - 1}; make the plan again"
                )
            seen += [d for g in micro_batch.groups for d in g.documents]
            for g, group in enumerate(micro_batch.groups):
                self._validate_shares(group, f"{source}: micro-batch {m} group {g}")
        if sorted(seen) != list(range(len(self.lengths))):
            raise PlanError(
                f"{source}: the groups hold {len(seen)} documents instead of each of "
                f"{len(self.lengths)} once; make the plan again"
            )

    def _validate_shares(self, group: Group, name: str) -> None:
        if self.placement == "groups":
            if group.shares or group.rank_s:
                raise PlanError(f"{name} has shares without `free` placement; make the plan again")
            return
        lengths = [self.lengths[d] for d in group.documents if 0 <= d < len(self.lengths)]
        if (
            len(group.rank_s) != group.degree
            or [sum(s) for s in group.shares] != lengths
            or any(len(s) != group.degree or min(s) < 0 for s in group.shares)
        ):
            raise PlanError(
                f"{name}: the shares of each document must be one number of tokens for each of its "
                f"{group.degree} ranks and add up to the document; make the plan again"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        target = Path(path)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_text(self.to_json() + "\n", encoding="utf-8")
        os.replace(draft, target)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        cluster_fingerprint: str | None = None,
        world_size: int | None = None,
    ) -> Plan:
        """Read a plan file; see `from_json`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from None
        return cls.from_json(
            text,
            source=str(path),
            cluster_fingerprint=cluster_fingerprint,
            world_size=world_size,
        )


def _are_ranks(ranks: tuple[int, ...], world_size: int) -> bool:
    return len(set(ranks)) == len(ranks) and all(0 <= r < world_size for r in ranks)


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PlanError(f"{source} is not JSON ({error}); make the plan again") from None
    if not isinstance(data, dict) or data.pop("format", None) != "dist_attn plan":
        raise PlanError(f"{source} is JSON but not a plan; `dist-attn plan` writes plans")
    if "version" not in data:
        raise PlanError(f"{source}: a plan without a version; make the plan again")
    return data


def _build(data: dict[str, Any]) -> Plan:
    micro_batches = tuple(
        MicroBatch(tuple(_build_group(g) for g in m.pop("groups")), **m)
        for m in data.pop("micro_batches")
    )
    if not all(m.groups for m in micro_batches):
        raise ValueError("a micro-batch without groups")
    lengths = _integers(data.pop("lengths"))
    solver = SolverReport(**data.pop("solver"))
    return Plan(lengths=lengths, micro_batches=micro_batches, solver=solver, **data)


def _build_group(data: dict[str, Any]) -> Group:
    ranks, documents = _integers(data.pop("ranks")), _integers(data.pop("documents"))
    if not ranks:
        raise ValueError("a group without ranks")
    shares = tuple(_integers(share) for share in data.pop("shares", []))
    rank_s = tuple(float(s) for s in data.pop("rank_s", []))
    group = Group(ranks=ranks, documents=documents, shares=shares, rank_s=rank_s, **data)
    if not isinstance(group.strategy, str):
        raise TypeError("a strategy that is not a word")
    return group


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise TypeError("integers expected")
    return tuple(values)
