"""The run: corpus, model, plans, steps, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_attn.config import Config, EngineConfig
from dist_attn.config_device import describe_loss
from dist_attn.data import SamplerPosition
from dist_attn.data.indexed import IntArray
from dist_attn.errors import Stopped
from dist_attn.groups import GroupPool
from dist_attn.integrations.engine import Engine, engine_factory
from dist_attn.integrations.hf import build_model, model_frequencies
from dist_attn.planner.fitting import layer_rules_of
from dist_attn.planner.levels import strategy_letters
from dist_attn.planner.shape import ModelShape
from dist_attn.training.checkpoint import load_checkpoint, save_checkpoint
from dist_attn.training.checkpoint_files import TrainState, choose_checkpoint, has_checkpoint
from dist_attn.training.corpus_guard import CorpusGuard
from dist_attn.training.metrics import Reporter, describe_peaks
from dist_attn.training.nonfinite import NonFinitePolicy
from dist_attn.training.planning import PlanSource
from dist_attn.training.run_folder import RunFolder
from dist_attn.training.runtime import Runtime, choose_device, joined
from dist_attn.training.schedule import learning_rate
from dist_attn.training.setup import check_identity, check_steps_left, run_identity
from dist_attn.training.stages import Stage, Stages, open_stages
from dist_attn.training.step import StepRunner
from dist_attn.training.step_report import StepOutcome, StepReports
from dist_attn.training.stop import StopRequest
from dist_attn.training.watchdog import SETUP, Mark, no_mark

logger = logging.getLogger(__name__)

#: `--resume auto`: go on if there is something to go on from, else begin.
RESUME_IF_BEGUN = "auto"


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
    stages = open_stages(config, runtime, begun_with)
    first = stages.of_step(0)
    state = TrainState(0, 0, 0, 0, run_identity(config, first.corpus))
    with runtime.together():
        if checkpoint is None and not begun:
            folder.check_free()
        if checkpoint is not None and saved is not None:
            check_identity(checkpoint, saved.identity, state.identity)
            check_steps_left(checkpoint, saved.step, config.run.steps)
            state = saved
    run = _Run(config, runtime, folder, stages, stop or StopRequest(), mark)
    try:
        # The first plan is solved while the model is built.
        run.prepare(state)
        mark(SETUP, "building the model")
        run.build(state, checkpoint)
        mark(SETUP, "opening the run folder")
        with runtime.together():
            if runtime.is_main:
                if checkpoint is None and not begun:
                    folder.create(config)
                else:
                    folder.reopen(config, state.step)
                folder.remember(first.corpus.cache_folder)
        with runtime.together():
            folder.check_visible()
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
        stages: Stages,
        stop: StopRequest,
        mark: Mark,
    ) -> None:
        self._mark = mark
        self._config = config
        self._stop = stop
        self._runtime = runtime
        self._folder = folder
        self._stages = stages
        # A plan may need every aligned block of ranks at once, but those of disjoint groups.
        rules = config.planner
        many = rules.placement == "free" or rules.synchronisation == "step"
        capacity = max(64, 2 * runtime.world_size) if many else 64
        capacity *= config.engine.tensor_parallel_degree
        self._pool = GroupPool(capacity, copy_engines=config.attention.copy_engines)
        self._engine: Engine | None = None
        self._hf_config: Any
        #: Of the step that is planned next, and of the step that runs; both None before the first.
        self._planned: Stage | None = None
        self._plans: PlanSource | None = None
        self._stage: Stage | None = None
        self._reports = StepReports(config, runtime, self._pool)
        self._guard: CorpusGuard
        self._runner: StepRunner
        self._nonfinite: NonFinitePolicy
        #: Memory of the fullest step, measured and predicted.
        self._peaks = (0.0, 0.0)

    def prepare(self, state: TrainState) -> None:
        """Let the first plan be solved in the background."""
        stage = self._stages.of_step(state.step)
        ids, _ = stage.sampler.batch(self._position(state))
        self._prepare(state.step, ids)

    def build(self, state: TrainState, checkpoint: Path | None) -> None:
        """Make the model and its engine, with the weights of a checkpoint if there is one."""
        runtime, stage = self._runtime, self._stages.of_step(state.step)
        config = stage.config
        with runtime.together():
            model = build_model(config.model, stage.corpus.vocab_size, config.run.seed)
            self._hf_config = model.hf_config
            stage.corpus.require_vocab(model.hf_config.vocab_size)
            for other in self._stages:
                # A scaling that does not fit ends the run now, not when its stage begins.
                model_frequencies(other.config.model, model.hf_config)
        make = engine_factory(config.engine.name)
        with runtime.together():
            self._engine = make(model, config, runtime.device)
        if checkpoint is not None:
            self._mark(SETUP, "reading the checkpoint")
            load_checkpoint(checkpoint, self._engine, runtime, checked=True)

    def _position(self, state: TrainState) -> SamplerPosition:
        """Where the next batch begins: at a stage's first step, where that stage begins."""
        stage = self._stages.of_step(state.step)
        if state.step == stage.first_step:
            return stage.start
        return SamplerPosition(state.epoch, state.offset)

    def _prepare(self, step: int, ids: IntArray) -> None:
        """Begin to plan a step; a stage has a planning problem of its own."""
        stage = self._stages.of_step(step)
        if stage is not self._planned:
            if self._plans is not None:
                self._plans.close()
            self._plans = PlanSource(stage.problem, self._runtime, self._folder.plans)
            self._planned = stage
        assert self._plans is not None
        self._plans.prepare(step, _lengths(stage, ids))

    def _enter(self, stage: Stage, reporter: Reporter | None, *, resumed: bool) -> None:
        """Make a stage the one that steps belong to."""
        assert self._engine is not None
        self._stage = stage
        self._engine.set_rotary(model_frequencies(stage.config.model, self._hf_config))
        shape = ModelShape.from_config(stage.config.model, stage.corpus.vocab_size)
        rules = layer_rules_of(stage.config, shape)
        self._runner = StepRunner(
            self._engine,
            stage.corpus,
            stage.config,
            self._runtime,
            self._pool,
            rules,
            stage.problem.cluster.node_of,
        )
        self._nonfinite = NonFinitePolicy(
            self._config.run.nonfinite, stage.corpus.name, speaks=self._runtime.is_main
        )
        self._guard = CorpusGuard(stage.corpus, speaks=self._runtime.is_main)
        self._guard.tell()
        if reporter is not None:
            for line in self._stages.describe(stage, resumed=resumed):
                reporter.say(line)

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
            reporter.say(describe_peaks(*self._peaks, self._runtime.device))
            reporter.say(f"done: {steps} steps, everything in {self._folder.path}")

    def close(self) -> None:
        """Release the groups and what the engine holds."""
        if self._plans is not None:
            self._plans.close()
        self._pool.close()
        if self._engine is not None:
            self._engine.close()

    def _introduce(self, reporter: Reporter, state: TrainState) -> None:
        runtime, engine = self._runtime, self._config.engine
        legend = ", ".join(
            f"{strategy_letters(s)} {s.replace('ulysses', 'Ulysses')}"
            for s in self._config.attention.strategies
        )
        reporter.say(
            f"{runtime.world_size} ranks on {runtime.device.type}, {_describe(engine)}, "
            f"{self._config.model.dtype}; groups below: degree, {legend}, "
            f"+ at a time, | one after another"
        )
        if runtime.device.type != "cpu":  # where there is no choice
            reporter.say(describe_loss(self._config.model, engine, runtime.device.type))
        if state.step:
            reporter.say(f"resumed at step {state.step}, {state.tokens:,} tokens trained")

    def _steps(self, state: TrainState, reporter: Reporter | None) -> None:
        assert self._engine is not None
        begun_at = state.step
        for step in range(state.step, self._config.run.steps):
            begun = time.perf_counter()
            before, stage = self._stage, self._stages.of_step(step)
            if stage is not before:
                self._enter(stage, reporter, resumed=step == begun_at and step > stage.first_step)
            ids, following = stage.sampler.batch(self._position(state))
            self._mark(step, "planning")
            assert self._plans is not None
            plan, waited_s = self._plans.take(step, _lengths(stage, ids), partial(_check, reporter))
            if reporter is not None and stage is not before:
                reporter.say(stage.memory_statement(plan))
            self._prepare_next(step + 1, following)
            result = self._runner.accumulate(plan, ids, partial(self._mark, step))
            self._mark(step, "the optimizer")
            lr = learning_rate(step, self._config.run.steps, self._config.optimizer)
            norm = self._engine.step(lr)
            if math.isfinite(result.loss) and not math.isfinite(norm):
                result = replace(result, suspects=self._runner.suspects_of_gradients(ids))
            self._mark(step, "the exchange of metrics")
            seconds = time.perf_counter() - begun
            reports = self._reports.exchange(seconds, result, self._stop.signal_name)
            done = StepOutcome(step, plan, stage, waited_s, lr, norm)
            metrics = self._reports.sum_up(done, reports)
            suspects = [d for r in reports for d in r.result.suspects]
            skipped = self._nonfinite.skipped(step, metrics.loss, norm, suspects)
            self._peaks = max(self._peaks, (metrics.memory_gib, metrics.predicted_memory_gib))
            if reporter is not None:
                reporter.step(metrics, plan)
            state = TrainState(
                step + 1, following.epoch, following.offset,
                state.tokens + metrics.tokens, state.identity,
                state.skipped + skipped, stage.index,
            )  # fmt: skip
            stop = next((r.stop for r in reports if r.stop), None)
            path = self._checkpoint(state, reporter, stopping=stop is not None)
            if stop is not None and state.step < self._config.run.steps:
                raise Stopped(f"stopped by {stop} after step {step}; --resume goes on from {path}")

    def _prepare_next(self, step: int, following: SamplerPosition) -> None:
        if step >= self._config.run.steps:
            return
        stage = self._stages.of_step(step)
        ids, _ = stage.sampler.batch(stage.start if step == stage.first_step else following)
        self._prepare(step, ids)

    def _end(self, reporter: Reporter | None) -> None:
        """Wait for all ranks, so that their watchdogs look after one that does not come."""
        self._mark(self._config.run.steps, "the end")
        with self._runtime.together():
            _check(reporter)

    def _checkpoint(
        self, state: TrainState, reporter: Reporter | None, *, stopping: bool
    ) -> Path | None:
        config = self._config.checkpoint
        due = config.every_steps and state.step % config.every_steps == 0
        at_end = config.at_end and state.step == self._config.run.steps
        if not (due or at_end or stopping):
            return None
        assert self._engine is not None
        self._mark(state.step, "writing a checkpoint")
        path = save_checkpoint(
            self._folder.checkpoints, self._engine, state, self._runtime, keep=config.keep
        )
        self._guard.tell()
        if reporter is not None:
            reporter.say(f"checkpoint {path}")
        return path


def _lengths(stage: Stage, ids: IntArray) -> tuple[int, ...]:
    return tuple(int(n) for n in stage.corpus.lengths[ids])


def _check(reporter: Reporter | None) -> None:
    if reporter is not None:
        reporter.check()


def _describe(engine: EngineConfig) -> str:
    if engine.name == "megatron":
        return f"megatron with tensor parallelism of {engine.tensor_parallel_degree}"
    return f"ZeRO {engine.zero_stage}"
