"""What a run shows: a line per step, a progress bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_attn.config import LoggingConfig
from dist_attn.errors import ConfigError
from dist_attn.planner.levels import strategy_letters
from dist_attn.planner.plan import Plan
from dist_attn.training.run_folder import RunFolder


@dataclass(frozen=True)
class StepMetrics:
    """One step, over all ranks."""

    step: int
    #: Mean cross-entropy of the step's valid tokens, nats.
    loss: float
    lr: float
    grad_norm: float
    documents: int
    tokens: int
    tokens_per_s: float
    #: Whole step on the slowest rank, and what the plan promised for forward and backward.
    step_s: float
    predicted_s: float
    #: Seconds that rank 0 waited for the plan.
    plan_wait_s: float
    plan_solve_s: float
    plan_gap: float
    #: Per micro-batch the slowest rank's forward over the ranks' mean forward, idle ranks included,
    #: weighted by time. The backward is left out: it waits for other ranks' gradients.
    imbalance: float
    #: Who took longest to compute its share of the work, waits left out, and how much longer than
    #: the median rank.
    slowest_rank: int
    slowest_rank_ratio: float
    #: Padding among the tokens that went through the model.
    padding_share: float
    #: Fullest rank: peak of the CUDA allocator, or resident memory of the process.
    memory_gib: float
    #: What the memory model says of the rank with most tokens.
    predicted_memory_gib: float
    micro_batches: int
    #: The plan in short, such as `4r | 2u+1+1`.
    groups: str
    stage: int = 0


def describe_groups(plan: Plan) -> str:
    """A plan in short: micro-batches by `|`, degrees by `+`, letters for strategies.

    Equal micro-batches and equal groups are counted: `2x(4r) | 3x1+5u`.
    """
    parts = []
    for micro_batch in plan.micro_batches:
        groups = Counter(
            f"{g.degree}{'' if g.degree == 1 else strategy_letters(g.strategy)}"
            for g in sorted(micro_batch.groups, key=lambda g: -g.degree)
        )
        parts.append("+".join(f"{n}x{g}" if n > 1 else g for g, n in groups.items()))
    counted = Counter(parts)
    return " | ".join(f"{n}x({p})" if n > 1 else p for p, n in counted.items())


def imbalance(forward_s: list[list[float]]) -> float:
    """Largest over mean, per micro-batch and weighted by time.

    Ranks that run different numbers of micro-batches do not wait in each: their sums are compared.

    Args:
        forward_s: per rank, the forward seconds of each micro-batch.
    """
    if len({len(times) for times in forward_s}) > 1:
        forward_s = [[sum(times)] for times in forward_s]
    by_micro_batch = list(zip(*forward_s, strict=True))
    largest = sum(max(times) for times in by_micro_batch)
    mean = sum(sum(times) / len(times) for times in by_micro_batch)
    return largest / mean if mean > 0 else 1.0


def memory_gib(device: torch.device) -> float:
    """Peak of the CUDA allocator since the last call, or resident memory now."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def describe_peaks(measured_gib: float, predicted_gib: float, device: torch.device) -> str:
    """The memory of a run's fullest step in words."""
    text = f"peak memory of the fullest rank: {measured_gib:.1f} GiB measured, "
    if device.type == "cpu":
        return text + "the whole process; predictions are of a GPU's tensors"
    return text + f"{predicted_gib:.1f} GiB predicted ({predicted_gib / measured_gib - 1:+.0%})"


class Reporter:
    """Writes everything that is shown or recorded; on rank 0 only.

    Use as a context manager, so that the progress bar leaves the terminal as it was.
    """

    def __init__(
        self, config: LoggingConfig, folder: RunFolder, first_step: int, num_steps: int
    ) -> None:
        self._config = config
        self._folder = folder
        self._num_steps = num_steps
        self.console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (config.progress_bar and sys.stdout.isatty()),
        )
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=first_step, loss="-"
        )
        self._failure: str | None = None
        self._writer: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - rank 0 alone

            self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step)
        self._lines = folder.metrics.open("a", encoding="utf-8")

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
        # Closing writes what is left; where that fails, `check` or another error has said why.
        with contextlib.suppress(OSError):
            self._lines.close()
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()

    def say(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        self.console.print(text, markup=False)

    def check(self) -> None:
        """Raise ConfigError if a step could not be recorded."""
        if self._failure is not None:
            raise ConfigError(
                f"run.dir: cannot write {self._folder.path}: {self._failure}; make room, then "
                f"--resume goes on from the newest checkpoint"
            )

    def step(self, metrics: StepMetrics, plan: Plan) -> None:
        """Record one step; what cannot be written is told by the next `check`, on all ranks."""
        try:
            self._lines.write(json.dumps(asdict(metrics)) + "\n")
            self._lines.flush()
            if self._writer is not None:
                self._record(metrics, plan)
        except OSError as error:
            self._failure = self._failure or str(error)
        self.say(_line(metrics, self._num_steps))
        self._progress.update(self._task, completed=metrics.step + 1, loss=f"{metrics.loss:.4f}")

    def _record(self, m: StepMetrics, plan: Plan) -> None:
        scalars = {
            "train/loss": m.loss,
            "train/tokens_per_s": m.tokens_per_s,
            "train/lr": m.lr,
            "train/grad_norm": m.grad_norm,
            "time/step_measured_s": m.step_s,
            "time/step_predicted_s": m.predicted_s,
            "time/plan_wait_s": m.plan_wait_s,
            "time/plan_solve_s": m.plan_solve_s,
            "balance/imbalance": m.imbalance,
            "balance/slowest_rank": m.slowest_rank,
            "balance/slowest_rank_ratio": m.slowest_rank_ratio,
            "balance/padding_share": m.padding_share,
            "memory/peak_gib": m.memory_gib,
            "memory/predicted_gib": m.predicted_memory_gib,
            "plan/micro_batches": m.micro_batches,
            "plan/gap": m.plan_gap,
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, m.step)
        every = self._config.plan_picture_every_steps
        if every and m.step % every == 0:
            # matplotlib, half a second that no other rank has to spend.
            from dist_attn.planner.figure import figure  # noqa: PLC0415

            self._writer.add_figure("plan/timeline", figure(plan), m.step)


def _line(m: StepMetrics, num_steps: int) -> str:
    width = len(str(num_steps - 1))
    return (
        f"step {m.step:{width}d}  loss {m.loss:.4f}  {m.documents:3d} docs {m.tokens:,} tokens  "
        f"{m.step_s:.2f} s (plan {m.predicted_s:.2f} s)  {m.tokens_per_s:,.0f} tok/s  "
        f"wait {m.plan_wait_s:.3f} s  imbalance {m.imbalance:.2f}  groups {m.groups}"
    )
