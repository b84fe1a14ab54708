"""Corpus files that change or disappear while a run reads them, and before it goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_attn.training import corpus_guard
from tests.e2e.command import losses, small_config
from tests.faults import OVERRIDES, at_step, listening, training
from tests.ranks import run_ranks

CONSTANT = [*OVERRIDES, "optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(training, 2, str(small_config(folder)), CONSTANT) == ["done"] * 2
    return losses(folder / "run")


def tokens_of(folder: Path) -> Path:
    (path,) = (folder / "corpus-cache").glob("*/tokens.bin")
    return path


def remove_texts(folder: Path) -> None:
    shutil.rmtree(folder / "texts")


def remove_cache(folder: Path) -> None:
    shutil.rmtree(folder / "corpus-cache")


def truncate_tokens(folder: Path) -> None:
    os.truncate(tokens_of(folder), 1000)


def overwrite_tokens(folder: Path) -> None:
    with tokens_of(folder).open("r+b") as file:
        file.write(b"overwritten")


def training_while(
    config: str, overrides: list[str], event: Callable[[Path], None], resume: str | None = None
) -> tuple[str, list[str]]:
    """Train; in the fifth step something happens to the files. How it ended, and warnings."""

    def happen() -> None:
        # Every rank has read the step's tokens.
        dist.barrier()
        if dist.get_rank() == 0:
            event(Path(config).parent)

    with at_step(5, happen, "_read"), listening(corpus_guard.logger) as said:
        return training(config, overrides, resume), said


def test_texts_that_disappear_leave_the_run_and_its_resumption(
    tmp_path: Path, curve: list[float]
) -> None:
    config = str(small_config(tmp_path))
    half = [*CONSTANT, "run.steps=6"]
    ends = run_ranks(training_while, 2, config, half, remove_texts)
    assert [e[0] for e in ends] == ["done"] * 2
    assert len(ends[0][1]) == 1
    assert ends[1][1] == []
    assert "00.txt cannot be read any more (No such file or directory)" in ends[0][1][0]
    assert "and 37 more. The run goes on with the tokens that it began with" in ends[0][1][0]
    # Resumed by ranks that see no texts at all, and are told of it again.
    ends = run_ranks(training_while, 2, config, [*CONSTANT, "run.steps=9"], remove_nothing, "auto")
    assert [e[0] for e in ends] == ["done"] * 2
    assert "can be resumed for as long as that is there" in ends[0][1][0]
    # Texts that came back otherwise are no reason to take others than before.
    small_config(tmp_path)
    (tmp_path / "texts" / "00.txt").write_text("another text")
    assert run_ranks(training, 2, config, CONSTANT, "auto") == ["done"] * 2
    assert losses(tmp_path / "run") == curve


def remove_nothing(folder: Path) -> None:
    """Nothing happens."""


@pytest.mark.slow
def test_a_cache_that_disappears_leaves_the_run(tmp_path: Path, curve: list[float]) -> None:
    config = str(small_config(tmp_path))
    ends = run_ranks(training_while, 2, config, CONSTANT, remove_cache)
    assert [e[0] for e in ends] == ["done"] * 2
    assert "tokens.bin cannot be read any more" in ends[0][1][0]
    assert losses(tmp_path / "run") == curve


@pytest.mark.parametrize(
    "event", [truncate_tokens, pytest.param(overwrite_tokens, marks=pytest.mark.slow)]
)
def test_tokens_that_are_written_to_end_the_run(
    tmp_path: Path, curve: list[float], event: Callable[[Path], None]
) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    ends = run_ranks(training_while, 2, config, CONSTANT, event)
    assert ends[0][0] == ends[1][0]
    assert "tokens.bin was written to while the run reads it" in ends[0][0]
    assert "delete its folder" in ends[0][0]
    assert len(losses(run)) == 5
    # As they are, the tokens are not taken again.
    text = run_ranks(training, 2, config, CONSTANT, "latest")[0]
    assert "is truncated" in text or "holds other tokens than were written" in text
    remove_cache(tmp_path)
    assert run_ranks(training, 2, config, CONSTANT, "latest") == ["done"] * 2
    assert losses(run) == curve
