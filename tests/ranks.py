"""Run a test's function in several gloo ranks on this machine.

    def sum_of_ranks(start: int) -> float:
        x = torch.tensor([float(start + dist.get_rank())])
        dist.all_reduce(x)
        return x.item()

    def test_sum():
        assert run_ranks(sum_of_ranks, 3, 10) == [33.0, 33.0, 33.0]

The function must sit at module level: it travels by name. Ranks are forked from a server that has
imported the heavy packages once, find each other through a fresh file, and stay alive for the next
test of the same world size. When a rank fails or runs out of time, all of its fellows are ended at
once and the test fails with that rank's traceback.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "dist_attn.training.loop",
    "dist_attn.integrations.deepspeed_engine",
    "dist_attn.integrations.megatron_engine",
    "tests.attention_cases",
    "tests.faults",
]
START_TIMEOUT_S = 90.0


class RankFailure(AssertionError):  # noqa: N818
    """A rank raised, died or ran out of time; the text holds its traceback."""


@dataclass(frozen=True)
class Outcome:
    """How one rank of `run_ranks_to_the_end` ended: a value, an error's traceback, or a signal."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None

    @property
    def killed(self) -> bool:
        """Whether a signal ended the process."""
        return self.exitcode is not None and self.exitcode < 0


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    fresh: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` in `world_size` ranks and return each rank's value.

    Args:
        function: a module-level function; `torch.distributed` is initialised when it runs.
        world_size: number of ranks.
        args: picklable arguments, the same for every rank.
        timeout_s: the whole call may take this long.
        fresh: use new processes for this call alone.
        kwargs: picklable keyword arguments.

    Raises:
        RankFailure: with the traceback of the first rank that failed.
    """
    pool = _Pool(world_size) if fresh else _pool(world_size)
    try:
        return pool.call(function, args, kwargs, timeout_s)
    except BaseException:
        pool.close()
        raise
    finally:
        if fresh:
            pool.close()


def run_ranks_to_the_end(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60.0,
    **kwargs: Any,
) -> list[Outcome]:
    """Call `function` in fresh ranks of which some may die, and say how each of them ended.

    A rank kills itself with `kill_this_rank()`. Ranks that are still busy `timeout_s` later are
    ended and count as killed.
    """
    pool = _Pool(world_size)
    try:
        return pool.outcomes(function, args, kwargs, timeout_s)
    finally:
        pool.close()


def kill_this_rank() -> None:
    """End the calling process with SIGKILL, as a lost machine would."""
    os.kill(os.getpid(), signal.SIGKILL)


class _Pool:
    """Processes of one world size that have initialised torch.distributed together."""

    def __init__(self, world_size: int) -> None:
        context = _context()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        rendezvous = Path(self.folder.name) / "rendezvous"
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(rank, world_size, str(rendezvous), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        try:
            self._collect(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def call(
        self, function: Callable[..., Any], args: Any, kwargs: Any, timeout_s: float
    ) -> list[Any]:
        self._send(function, args, kwargs)
        return self._collect(timeout_s)

    def outcomes(
        self, function: Callable[..., Any], args: Any, kwargs: Any, timeout_s: float
    ) -> list[Outcome]:
        self._send(function, args, kwargs)
        deadline = time.monotonic() + timeout_s
        result = []
        for process, connection in zip(self.processes, self.connections, strict=True):
            left = max(0.0, deadline - time.monotonic())
            ready = wait([connection, process.sentinel], left)
            message = _receive(connection) if connection in ready else None
            if message is None:
                if process.is_alive():
                    process.kill()
                process.join()
                result.append(Outcome(exitcode=process.exitcode))
            else:
                kind, content = message
                ok = kind == "value"
                result.append(Outcome(value=content) if ok else Outcome(error=content))
        return result

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()
        for world_size, pool in list(_POOLS.items()):
            if pool is self:
                del _POOLS[world_size]

    def _send(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        task = pickle.dumps((function, args, kwargs))
        for connection in self.connections:
            connection.send_bytes(task)

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        values: dict[int, Any] = {}
        while len(values) < len(self.processes):
            open_ranks = [r for r in range(len(self.processes)) if r not in values]
            waiting: list[Any] = [self.connections[r] for r in open_ranks]
            waiting += [self.processes[r].sentinel for r in open_ranks]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(f"ranks {open_ranks} were not done after {timeout_s:g} s")
            for rank in open_ranks:
                if self.connections[rank] not in ready:
                    if self.processes[rank].sentinel in ready:
                        self._died(rank)
                    continue
                message = _receive(self.connections[rank])
                if message is None:
                    self._died(rank)
                    continue
                kind, values[rank] = message
                if kind == "error":
                    raise RankFailure(f"rank {rank} of {len(self.processes)}:\n{values[rank]}")
        return [values[r] for r in range(len(self.processes))]

    def _died(self, rank: int) -> None:
        self.processes[rank].join(5)
        raise RankFailure(f"rank {rank} died with exit code {self.processes[rank].exitcode}")


_POOLS: dict[int, _Pool] = {}


def _pool(world_size: int) -> _Pool:
    if world_size not in _POOLS:
        _POOLS[world_size] = _Pool(world_size)
    return _POOLS[world_size]


@atexit.register
def _close_pools() -> None:
    for pool in list(_POOLS.values()):
        pool.close()


def _context() -> Any:
    # These are read when torch and deepspeed are imported, which happens in the fork server.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _receive(connection: Connection) -> Sequence[Any] | None:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None


def _worker(rank: int, world_size: int, rendezvous: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What was imported stays; looking through it for garbage took 0.3 s each time.
    gc.freeze()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        dist.barrier()
        connection.send_bytes(pickle.dumps(("value", None)))
    except Exception:
        connection.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            task = connection.recv_bytes()
            try:
                function, args, kwargs = pickle.loads(task)
                message = pickle.dumps(("value", function(*args, **kwargs)))
            except Exception:
                message = pickle.dumps(("error", traceback.format_exc()))
            connection.send_bytes(message)
