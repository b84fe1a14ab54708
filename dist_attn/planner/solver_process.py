"""The solver in a process of its own, which holds neither torch nor a GPU and may fail alone."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections import deque
from multiprocessing.connection import Connection
from typing import Any, Protocol

from dist_attn.errors import PlanError, UserError
from dist_attn.planner.plan import Plan

logger = logging.getLogger(__name__)

Lengths = tuple[int, ...]
#: A solver that dies or hangs is started again so often for the same batch.
_RETRIES = 1


class Problem(Protocol):
    """Something picklable that plans batches."""

    def solve(self, lengths: Lengths) -> Plan:
        """Plan one batch."""


class SolverProcess:
    """Solves batches one after another, in the order in which they were submitted.

    A solver that ends (killed for its memory, say) or gives no answer for `give_up_s` seconds is
    replaced once and asked again; then the batch is refused with a PlanError.
    """

    def __init__(self, problem: Problem, give_up_s: float) -> None:
        self._problem = problem
        self._give_up_s = give_up_s
        self._waiting: deque[Lengths] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection

    def submit(self, lengths: Lengths) -> None:
        """Let a batch be solved in the background."""
        self._waiting.append(lengths)
        if self._process is None:
            self._start()
        else:
            self._send(lengths)

    def take(self, lengths: Lengths) -> Plan:
        """Wait for the plan of the batch that was submitted first.

        Raises:
            UserError: what the solver says about the batch, or that it failed twice.
        """
        assert self._waiting[0] == lengths, "a plan was prepared for another batch"
        for attempt in range(_RETRIES + 1):
            answer, failure = self._answer()
            if failure is None:
                self._waiting.popleft()
                if isinstance(answer, UserError):
                    raise answer
                return answer
            self.close()
            logger.warning(
                "the planner %s over a batch of %d documents and %d tokens%s",
                failure, len(lengths), sum(lengths),
                "; it is started again" if attempt < _RETRIES else "",
            )  # fmt: skip
            if attempt < _RETRIES:
                self._start()
        self._waiting.popleft()
        raise PlanError(
            f"the planner {failure} {_RETRIES + 1} times over a batch of {len(lengths)} documents "
            f"and {sum(lengths)} tokens; if the machine ran out of memory, lower data.batch; if it "
            f"is slow, raise planner.give_up_s ({self._give_up_s:g})"
        )

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self._connection = Connection(os.dup(ours.fileno()))
        self._send(self._problem)
        for lengths in self._waiting:
            self._send(lengths)

    def _send(self, what: object) -> None:
        try:
            self._connection.send(what)
        except OSError:
            logger.debug("the planner's process is gone; `take` starts it again")

    def _answer(self) -> tuple[Any, str | None]:
        """A Plan or a UserError, or in what way the process failed."""
        try:
            if not self._connection.poll(self._give_up_s):
                return None, f"gave no answer for {self._give_up_s:g} s"
            return self._connection.recv(), None
        except (EOFError, OSError):
            assert self._process is not None
            return None, f"ended with exit code {self._process.wait()}"


def main(descriptor: int) -> None:
    """Serve batches until the other end is closed."""
    with Connection(descriptor) as connection:
        try:
            problem: Problem = connection.recv()
            while True:
                lengths = connection.recv()
                try:
                    connection.send(problem.solve(lengths))
                except UserError as error:
                    connection.send(error)
        except (EOFError, OSError):
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
