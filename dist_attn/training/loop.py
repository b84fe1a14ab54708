"""The run: corpus, model, plans, steps, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dist_attn.config import Config, EngineConfig
from dist_attn.data import BatchSampler, Corpus, SamplerPosition
from dist_attn.data.indexed import IntArray
from dist_attn.errors import Stopped
from dist_attn.groups import GroupPool
from dist_attn.integrations.engine import Engine, engine_factory
from dist_attn.integrations.hf import build_model
from dist_attn.planner.command import layer_rules_of
from dist_attn.planner.levels import strategy_letters
from dist_attn.planner.plan import Plan
from dist_attn.planner.shape import ModelShape
from dist_attn.training.checkpoint import load_checkpoint, save_checkpoint
from dist_attn.training.checkpoint_files import TrainState, choose_checkpoint, has_checkpoint
from dist_attn.training.corpus_guard import CorpusGuard
from dist_attn.training.metrics import (
    Reporter,
    StepMetrics,
    describe_groups,
    imbalance,
    memory_gib,
)
from dist_attn.training.nonfinite import NonFinitePolicy
from dist_attn.training.planning import PlanSource
from dist_attn.training.run_folder import RunFolder
from dist_attn.training.runtime import Runtime, choose_device, joined
from dist_attn.training.schedule import learning_rate
from dist_attn.training.setup import (
    check_identity,
    check_longest,
    check_steps_left,
    open_corpus_on_every_rank,
    planning_problem,
    run_identity,
)
from dist_attn.training.slow_ranks import SlowRanks
from dist_attn.training.step import StepResult, StepRunner
from dist_attn.training.stop import StopRequest
from dist_attn.training.watchdog import SETUP, Mark, no_mark

logger = logging.getLogger(__name__)

#: `--resume auto`: go on if there is something to go on from, else begin.
RESUME_IF_BEGUN = "auto"


@dataclass(frozen=True)
class _RankReport:
    """What one rank tells the others after a step."""

    seconds: float
    result: StepResult
    memory_gib: float
    #: A stop signal that came to this rank.
    stop: str | None


def train(config: Config, resume: str | None = None) -> None:
    """Run or continue the configured training in this rank.

    Args:
        config: as read; what is `auto` is decided here.
        resume: `latest`, or the name or path of a checkpoint; None for a new run; `auto` for the
            newest checkpoint if there is one, else a new run.

    Raises:
        UserError: on every rank alike, when the input is at fault.
        Stopped: on every rank alike, after SIGTERM or SIGUSR1 came to any and a checkpoint was
            written.

    Collective: by all ranks; the process group is made from the environment and ended.
    """
    with StopRequest() as stop:
        config = config.on(choose_device(config.run.device, 0).type)
        with joined(config.run) as (runtime, mark):
            run_training(config, resume, runtime, stop, mark)


def run_training(
    config: Config,
    resume: str | None,
    runtime: Runtime,
    stop: StopRequest | None = None,
    mark: Mark = no_mark,
) -> None:
    """Run or continue the training on a process group that exists; see `train`."""
    folder = RunFolder(Path(config.run.dir))
    begun, auto = False, resume == RESUME_IF_BEGUN
    checkpoint = saved = None
    if auto:
        begun, resume = runtime.broadcast(_what_is_there(folder))
    mark(SETUP, "choosing a checkpoint")
    if resume is not None:
        checkpoint, saved = choose_checkpoint(folder.checkpoints, resume, runtime)
        if auto and saved.step >= config.run.steps:
            if runtime.is_main:
                logger.info("%s: all of run.steps (%d) are done", folder.path, config.run.steps)
            return
    mark(SETUP, "reading the corpus")
    begun_with = runtime.broadcast(folder.begun_with() if resume or begun else None)
    corpus = open_corpus_on_every_rank(config, runtime, begun_with)
    mark(SETUP, "setting up the planner")
    problem = planning_problem(config, corpus, runtime)
    with runtime.together():
        check_longest(problem, corpus)
    state = TrainState(0, 0, 0, 0, run_identity(config, corpus))
    with runtime.together():
        if checkpoint is None and not begun:
            folder.check_free()
        if checkpoint is not None and saved is not None:
            check_identity(checkpoint, saved.identity, state.identity)
            check_steps_left(checkpoint, saved.step, config.run.steps)
            state = saved
    with contextlib.closing(PlanSource(problem, runtime, folder.plans)) as plans:
        run = _Run(config, runtime, folder, corpus, plans, stop or StopRequest(), mark)
        # The first plan is solved while the model is built.
        run.prepare(state)
        mark(SETUP, "building the model")
        run.build(checkpoint)
        mark(SETUP, "opening the run folder")
        with runtime.together():
            if runtime.is_main:
                if checkpoint is None and not begun:
                    folder.create(config)
                else:
                    folder.reopen(config, state.step)
                folder.remember(corpus.cache_folder)
        with runtime.together():
            folder.check_visible()
        try:
            run.go(state)
        finally:
            run.close()


def _what_is_there(folder: RunFolder) -> tuple[bool, str | None]:
    """Whether a run began in the folder, and the checkpoint to go on from."""
    there = has_checkpoint(folder.checkpoints)
    return folder.metrics.is_file(), "latest" if there else None


class _Run:
    """The steps of a run on one rank."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        folder: RunFolder,
        corpus: Corpus,
        plans: PlanSource,
        stop: StopRequest,
        mark: Mark,
    ) -> None:
        self._mark = mark
        self._config = config
        self._stop = stop
        self._runtime = runtime
        self._folder = folder
        self._corpus = corpus
        self._plans = plans
        # A plan may need every aligned block of ranks at once, but those of disjoint groups.
        rules = config.planner
        many = rules.placement == "free" or rules.synchronisation == "step"
        capacity = max(64, 2 * runtime.world_size) if many else 64
        capacity *= config.engine.tensor_parallel_degree
        self._pool = GroupPool(capacity, copy_engines=config.attention.copy_engines)
        self._tensor_parallel_degree = config.engine.tensor_parallel_degree
        self._guard = CorpusGuard(corpus, speaks=runtime.is_main)
        self._slow_ranks = SlowRanks(
            config.run.slow_rank_factor,
            config.run.slow_rank_steps,
            runtime.nodes,
            speaks=runtime.is_main,
        )
        self._nonfinite = NonFinitePolicy(config.run.nonfinite, corpus.name, speaks=runtime.is_main)
        self._engine: Engine
        self._runner: StepRunner
        with runtime.together():
            self._sampler = BatchSampler(
                corpus.lengths, config.data.batch, config.run.seed, config.data.shuffle
            )

    def prepare(self, state: TrainState) -> None:
        """Let the first plan be solved in the background."""
        ids, _ = self._sampler.batch(SamplerPosition(state.epoch, state.offset))
        self._plans.prepare(state.step, self._lengths(ids))

    def build(self, checkpoint: Path | None) -> None:
        """Make the model and its engine, with the weights of a checkpoint if there is one."""
        config, runtime = self._config, self._runtime
        with runtime.together():
            model = build_model(config.model, self._corpus.vocab_size, config.run.seed)
            self._corpus.require_vocab(model.hf_config.vocab_size)
        make = engine_factory(config.engine.name)
        with runtime.together():
            self._engine = make(model, config, runtime.device)
        if checkpoint is not None:
            self._mark(SETUP, "reading the checkpoint")
            load_checkpoint(checkpoint, self._engine, runtime, checked=True)
        shape = ModelShape.from_config(config.model, self._corpus.vocab_size)
        rules = layer_rules_of(config, shape)
        self._runner = StepRunner(
            self._engine, self._corpus, config, runtime, self._pool, rules, self._plans.node_of
        )

    def go(self, state: TrainState) -> None:
        """Do the steps that are left, and write checkpoints on the way."""
        steps = self._config.run.steps
        if not self._runtime.is_main:
            self._steps(state, None)
            self._end(None)
            return
        with Reporter(self._config.logging, self._folder, state.step, steps) as reporter:
            self._introduce(reporter, state)
            self._steps(state, reporter)
            self._end(reporter)
            reporter.say(f"done: {steps} steps, everything in {self._folder.path}")

    def close(self) -> None:
        """Release the groups and what the engine holds."""
        self._pool.close()
        self._engine.close()

    def _introduce(self, reporter: Reporter, state: TrainState) -> None:
        runtime, engine = self._runtime, self._config.engine
        legend = ", ".join(
            f"{strategy_letters(s)} {s.replace('ulysses', 'Ulysses')}"
            for s in self._config.attention.strategies
        )
        reporter.say(f"corpus: {self._corpus.report}")
        reporter.say(
            f"{runtime.world_size} ranks on {runtime.device.type}, {_describe(engine)}, "
            f"{self._config.model.dtype}; groups below: degree, {legend}, "
            f"+ at a time, | one after another"
        )
        if state.step:
            reporter.say(f"resumed at step {state.step}, {state.tokens:,} tokens trained")

    def _steps(self, state: TrainState, reporter: Reporter | None) -> None:
        ids, following = self._sampler.batch(SamplerPosition(state.epoch, state.offset))
        self._guard.tell()
        for step in range(state.step, self._config.run.steps):
            begun = time.perf_counter()
            self._mark(step, "planning")
            plan, waited_s = self._plans.take(step, self._lengths(ids), partial(_check, reporter))
            next_ids, after = self._sampler.batch(following)
            if step + 1 < self._config.run.steps:
                self._plans.prepare(step + 1, self._lengths(next_ids))
            result = self._runner.accumulate(plan, ids, partial(self._mark, step))
            self._mark(step, "the optimizer")
            lr = learning_rate(step, self._config.run.steps, self._config.optimizer)
            norm = self._engine.step(lr)
            if math.isfinite(result.loss) and not math.isfinite(norm):
                result = replace(result, suspects=self._runner.suspects_of_gradients(ids))
            self._mark(step, "the exchange of metrics")
            reports = self._exchange(time.perf_counter() - begun, result)
            metrics = self._metrics(step, plan, reports, waited_s, lr, norm)
            suspects = [d for r in reports for d in r.result.suspects]
            skipped = self._nonfinite.skipped(step, metrics.loss, norm, suspects)
            if reporter is not None:
                reporter.step(metrics, plan)
            state = TrainState(
                step + 1, following.epoch, following.offset,
                state.tokens + metrics.tokens, state.identity,
                state.skipped + skipped,
            )  # fmt: skip
            ids, following = next_ids, after
            stop = next((r.stop for r in reports if r.stop), None)
            path = self._checkpoint(state, reporter, stopping=stop is not None)
            if stop is not None and state.step < self._config.run.steps:
                raise Stopped(f"stopped by {stop} after step {step}; --resume goes on from {path}")

    def _end(self, reporter: Reporter | None) -> None:
        """Wait for all ranks, so that their watchdogs look after one that does not come."""
        self._mark(self._config.run.steps, "the end")
        with self._runtime.together():
            _check(reporter)

    def _lengths(self, ids: IntArray) -> tuple[int, ...]:
        return tuple(int(n) for n in self._corpus.lengths[ids])

    def _exchange(self, seconds: float, result: StepResult) -> list[_RankReport]:
        memory = memory_gib(self._runtime.device)
        mine = _RankReport(seconds, result, memory, self._stop.signal_name)
        return self._runtime.gather(mine)

    def _metrics(
        self,
        step: int,
        plan: Plan,
        reports: list[_RankReport],
        waited_s: float,
        lr: float,
        norm: float,
    ) -> StepMetrics:
        seconds = max(r.seconds for r in reports)
        slowest, ratio = self._slow_ranks.judge(step, [r.result.work for r in reports])
        # Neighbours that hold one model between them have the same tokens.
        padding = sum(r.result.padding for r in reports[:: self._tensor_parallel_degree])
        tokens = sum(plan.lengths)
        return StepMetrics(
            step=step,
            loss=reports[0].result.loss,
            lr=lr,
            grad_norm=norm,
            documents=len(plan.lengths),
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            predicted_s=plan.predicted_s,
            plan_wait_s=waited_s,
            plan_solve_s=plan.solver.seconds,
            plan_gap=plan.gap,
            imbalance=imbalance([r.result.forward_s for r in reports]),
            slowest_rank=slowest,
            slowest_rank_ratio=ratio,
            padding_share=padding / (tokens + padding),
            memory_gib=max(r.memory_gib for r in reports),
            micro_batches=len(plan.micro_batches),
            groups=describe_groups(plan),
        )

    def _checkpoint(
        self, state: TrainState, reporter: Reporter | None, *, stopping: bool
    ) -> Path | None:
        config = self._config.checkpoint
        due = config.every_steps and state.step % config.every_steps == 0
        at_end = config.at_end and state.step == self._config.run.steps
        if not (due or at_end or stopping):
            return None
        self._mark(state.step, "writing a checkpoint")
        path = save_checkpoint(
            self._folder.checkpoints, self._engine, state, self._runtime, keep=config.keep
        )
        self._guard.tell()
        if reporter is not None:
            reporter.say(f"checkpoint {path}")
        return path


def _check(reporter: Reporter | None) -> None:
    if reporter is not None:
        reporter.check()


def _describe(engine: EngineConfig) -> str:
    if engine.name == "megatron":
        return f"megatron with tensor parallelism of {engine.tensor_parallel_degree}"
    return f"ZeRO {engine.zero_stage}"
