"""The stages of a run: what each trains on, and at which step and document it begins.

Where a stage ends follows from the configuration and the corpus alone, because the sampler deals
the same batches everywhere; so that a resumed run finds its stage from the number of its step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dist_attn.config import Config, RopeConfig, StageConfig
from dist_attn.data import AnyCorpus, BatchSampler, SamplerPosition
from dist_attn.data.sampler import BoolArray
from dist_attn.planner.fitting import memory_of, planning_problem_of
from dist_attn.planner.memory import GIB, MemoryModel
from dist_attn.planner.plan import MicroBatch, Plan
from dist_attn.planner.problem import PlanningProblem
from dist_attn.training.runtime import Runtime
from dist_attn.training.setup import check_longest, devices_of_ranks, open_corpus_on_every_rank

#: A document of which this share was dealt already is left out of the rest of the epoch.
USED_SHARE = 0.5


@dataclass(frozen=True)
class Stage:
    """A part of the run, of the whole run where the configuration names no stages."""

    index: int
    #: The run's configuration with what the stage changes.
    config: Config
    corpus: AnyCorpus
    problem: PlanningProblem
    memory: MemoryModel
    sampler: BatchSampler
    first_step: int
    #: The step after its last one.
    end_step: int

    @property
    def start(self) -> SamplerPosition:
        """Where its first batch begins."""
        return self.sampler.start

    def memory_statement(self, plan: Plan) -> str:
        """What the fullest rank of a step is going to hold."""
        tokens = max(max(_tokens_of_ranks(m).values()) for m in plan.micro_batches)
        return (
            f"memory of a rank with {tokens:,} tokens, the most of this step: "
            f"{self.memory.statement(tokens)}; a rank can hold "
            f"{self.problem.cost.tokens_per_device():,} tokens{self._further_slots(plan)}"
        )

    def _further_slots(self, plan: Plan) -> str:
        """The slots of groups beside a rank's largest, in words."""
        tokens = max(_tokens_of_further_groups(plan, r) for r in range(plan.world_size))
        size = tokens * self.memory.slot_bytes_per_token
        return f"; slots of further groups take {size / GIB:.1f} GiB" if size else ""


def _tokens_of_further_groups(plan: Plan, rank: int) -> int:
    """A rank's tokens in each group of several that it works in, but for the largest."""
    largest: dict[tuple[int, ...], int] = {}
    for group in (g for m in plan.micro_batches for g in m.groups):
        if rank in group.ranks and group.degree > 1:
            tokens = -(-group.tokens // group.degree)
            largest[group.ranks] = max(tokens, largest.get(group.ranks, 0))
    return sum(sorted(largest.values())[:-1])


def _tokens_of_ranks(micro_batch: MicroBatch) -> Counter[int]:
    """Tokens of each rank, which may work in several groups."""
    tokens: Counter[int] = Counter()
    for group in micro_batch.groups:
        even = -(-group.tokens // group.degree)
        shares = np.array(group.shares).sum(axis=0).tolist() if group.shares else []
        tokens.update(dict(zip(group.ranks, shares or [even] * group.degree, strict=True)))
    return tokens


class Stages:
    """All stages that the run's steps reach, in order."""

    def __init__(self, stages: list[Stage], num_configured: int) -> None:
        self._stages = stages
        #: Stages that begin after run.steps.
        self.num_unreached = max(num_configured - len(stages), 0)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def of_step(self, step: int) -> Stage:
        """The stage that a step belongs to; the last one for steps after the run's."""
        return next((s for s in self._stages if step < s.end_step), self._stages[-1])

    def describe(self, stage: Stage, *, resumed: bool) -> list[str]:
        """Lines that introduce a stage."""
        lines = [f"corpus: {stage.corpus.report}"]
        if len(self._stages) == 1 and not self.num_unreached:
            return lines
        rope = stage.config.model.rope
        turned = "the model's own" if rope is None else f"{rope.rope_type} {_values(rope)}"
        more = f"; {self.num_unreached} more begin after run.steps" if self.num_unreached else ""
        lines.insert(
            0,
            f"stage {stage.index + 1} of {len(self._stages)}, steps {stage.first_step} to "
            f"{stage.end_step - 1}{', resumed' if resumed else ''}: documents of up to "
            f"{stage.config.data.max_document_tokens:,} tokens, rotary scaling {turned}{more}",
        )
        return lines


def open_stages(config: Config, runtime: Runtime, begun_with: str | None = None) -> Stages:
    """Open what every stage trains on and find where each begins.

    A run that goes on passes the folder of the cache that it has begun with.

    Every document of every stage is checked against the memory of the cluster.

    Collective: by all ranks.

    Raises:
        UserError: on every rank.
    """
    stages: list[Stage] = []
    step, begun = 0, None
    devices = devices_of_ranks(config, runtime)
    for index, entry in enumerate(config.stages or [None]):
        at = config.at_stage(index)
        corpus = open_corpus_on_every_rank(at, runtime, begun_with)
        with runtime.together():
            problem = planning_problem_of(at, devices, corpus.vocab_size)
            check_longest(problem, corpus, at, devices)
            used = None if begun is None else (begun[0], _pieces_of(corpus, begun[1]))
            sampler = BatchSampler(
                corpus.lengths, at.data.batch, at.run.seed, at.data.shuffle, used
            )
            end, position = _end(entry, corpus, sampler, step, at.run.steps)
        memory = memory_of(at, problem, corpus.vocab_size)
        stages.append(Stage(index, at, corpus, problem, memory, sampler, step, end))
        step = end
        if step >= config.run.steps:
            break
        begun = position.epoch, _used(corpus, sampler, position, begun)
    return Stages(stages, len(config.stages))


def _end(
    entry: StageConfig | None, corpus: AnyCorpus, sampler: BatchSampler, first: int, num_steps: int
) -> tuple[int, SamplerPosition]:
    """The step after a stage's last one, and the position that its batches have come to."""
    position = sampler.start
    if entry is None or entry.is_open:
        return num_steps, position
    step, tokens = first, 0
    while step < num_steps:
        ids, position = sampler.batch(position)
        tokens += int(corpus.lengths[ids].sum())
        step += 1
        if entry.steps == step - first or (entry.tokens is not None and tokens >= entry.tokens):
            break
    return step, position


def _used(
    corpus: AnyCorpus,
    sampler: BatchSampler,
    position: SamplerPosition,
    before: tuple[int, BoolArray] | None,
) -> BoolArray:
    """Which stored documents the epoch of a position has no need to deal again."""
    whole = corpus.source_tokens
    dealt = sampler.dealt(position)
    tokens = np.bincount(corpus.sources[dealt], weights=corpus.lengths[dealt], minlength=len(whole))
    used = (tokens >= USED_SHARE * whole) & (tokens > 0)
    if before is not None and before[0] == position.epoch:
        used |= before[1]
    return used


def _pieces_of(corpus: AnyCorpus, used: BoolArray) -> BoolArray:
    """Documents of a corpus that belong to used stored ones."""
    return np.asarray(used[corpus.sources])


def _values(rope: RopeConfig) -> str:
    values = rope.parameters().items()
    return ", ".join(f"{k} {v}" for k, v in values if k != "rope_type" and not isinstance(v, list))
