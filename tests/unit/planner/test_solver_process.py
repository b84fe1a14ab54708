"""A solver that dies or hangs is replaced once, and never stops the process that asks."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_attn.errors import PlanError
from dist_attn.planner.plan import Plan, SolverReport
from dist_attn.planner.solver_process import SolverProcess


@dataclass(frozen=True)
class Trouble:
    """Fails over batches of one document as often as the folder has files, then answers."""

    folder: str
    kind: str

    def solve(self, lengths: tuple[int, ...]) -> Plan:
        if lengths == (13,):
            raise PlanError("13 is refused")
        files = sorted(Path(self.folder).iterdir())
        if len(lengths) == 1 and files:
            files[0].unlink()
            if self.kind == "crash":
                os._exit(7)
            time.sleep(60)
        report = SolverReport("planned", 0.0, 0, 0, False)
        return Plan(lengths, 1, (), 0.0, 0.0, report, "cluster", "cost")


def trouble(folder: Path, kind: str, times: int) -> Trouble:
    for i in range(times):
        (folder / str(i)).touch()
    return Trouble(str(folder), kind)


@pytest.mark.parametrize(("kind", "words"), [("crash", "exit code 7"), ("hang", "no answer")])
def test_a_failing_solver_is_replaced_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, words: str
) -> None:
    solver = SolverProcess(trouble(tmp_path, kind, 1), give_up_s=60 if kind == "crash" else 2)
    try:
        for lengths in ((5,), (6, 7), (13,), (8,)):
            solver.submit(lengths)
        with caplog.at_level(logging.WARNING):
            assert solver.take((5,)).lengths == (5,)
        assert words in caplog.text
        assert "started again" in caplog.text
        # Batches that were waiting are not lost, nor is a refusal taken for a failure.
        assert solver.take((6, 7)).lengths == (6, 7)
        with pytest.raises(PlanError, match="13 is refused"):
            solver.take((13,))
        assert solver.take((8,)).lengths == (8,)
    finally:
        solver.close()


def test_a_solver_that_fails_twice_is_given_up(tmp_path: Path) -> None:
    solver = SolverProcess(trouble(tmp_path, "crash", 5), give_up_s=60)
    try:
        solver.submit((5, 6))
        solver.submit((5,))
        assert solver.take((5, 6)).lengths == (5, 6)
        begun = time.monotonic()
        with pytest.raises(PlanError, match=r"exit code 7 2 times .* 1 documents and 5 tokens"):
            solver.take((5,))
        assert time.monotonic() - begun < 30
    finally:
        solver.close()
