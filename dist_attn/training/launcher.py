"""Start the ranks of one node, and turn how they ended into one exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

import psutil

from dist_attn.errors import NODE_ERROR_EXIT, STOPPED_EXIT, USER_ERROR_EXIT, ConfigError
from dist_attn.training.slurm import LOOPBACK, NodePlace
from dist_attn.training.stop import STACKS_SIGNAL, STOP_SIGNALS

logger = logging.getLogger(__name__)

#: A rank that was stopped by a signal will not end by itself.
STOPPED_PATIENCE_S = 3.0
#: Ranks without a GPU when nobody says how many.
DEFAULT_CPU_RANKS = 4


def ranks_per_node(asked: int | None) -> int:
    """What was asked for, or one rank per GPU, or four where there is none."""
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"--nproc-per-node takes a positive number, got {asked}")
        return asked
    import torch

    return torch.cuda.device_count() or DEFAULT_CPU_RANKS


def launch(
    arguments: Sequence[str], num_ranks: int, patience_s: float, node: NodePlace | None = None
) -> int:
    """Run `dist-attn` with these arguments in `num_ranks` ranks of this machine.

    The ranks are torchrun's, on a free port of the loopback interface, or with those of other nodes
    at the place that `node` names. Unlike torchrun itself, it passes stop signals on to the ranks
    and waits for as long as they need, an exit code that a rank chose stays that code, with the
    rank's one message, and a rank that is still there `patience_s` after others ended is ended.

    Returns:
        The exit code of the first rank that failed, 128 + the signal that ended it, or 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from dist_attn.training.rendezvous import BACKEND, register

    # What elastic reports in a page, this reports in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    if node is None:
        node = NodePlace(0, 1, LOOPBACK, 0)
        # Where gloo would else listen at the address of the machine's name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    register()
    options = [
        "--rdzv-backend",
        BACKEND,
        "--rdzv-endpoint",
        f"{node.master_addr}:{node.master_port}",
    ]
    options += ["--rdzv-conf", f"rank={node.node_rank},timeout={patience_s:g}"]
    options += ["--nnodes", str(node.num_nodes), "--nproc-per-node", str(num_ranks)]
    options += ["--module", "dist_attn.cli"]
    parsed = parse_args([*options, *arguments])
    # The others are passed on by `_pass_on`; elastic itself would kill the ranks 30 s later.
    parsed.signals_to_handle = "SIGINT"
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    threading.Thread(target=_end_the_last, args=(num_ranks, patience_s), daemon=True).start()
    try:
        run(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code in (USER_ERROR_EXIT, NODE_ERROR_EXIT, STOPPED_EXIT):
            return code
        if code < 0:
            name = signal.Signals(-code).name
            logger.error("rank %d (process %d) was ended by %s", rank, failure.pid, name)
            return 128 - code
        logger.error("rank %d (process %d) failed with exit code %d", rank, failure.pid, code)
        return code
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    ranks = [p for p in psutil.Process().children() if _is_rank(p)]
    if not ranks:
        # Nothing has begun that could be lost.
        raise SystemExit(STOPPED_EXIT)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _end_the_last(num_ranks: int, patience_s: float) -> None:
    """End ranks that stay although others of this node are gone: stopped, or stuck in their end.

    They show their stacks first. Ranks that fail are not waited for: torch's agent ends the others
    itself, 30 s later.
    """
    complete, since = False, None
    while True:
        time.sleep(min(1.0, patience_s / 4))
        ranks = [p for p in psutil.Process().children() if _is_rank(p)]
        complete = complete or len(ranks) == num_ranks
        if not complete or not 0 < len(ranks) < num_ranks:
            since = None
            continue
        since = since or time.monotonic()
        waited_s = time.monotonic() - since
        for process in ranks:
            with contextlib.suppress(psutil.Error):
                status = process.status()
                patience = STOPPED_PATIENCE_S if status == psutil.STATUS_STOPPED else patience_s
                if waited_s < min(patience, patience_s):
                    continue
                logger.error(
                    "rank %s (process %d, %s) is still there %.3g s after others ended; it is "
                    "ended", process.environ()["RANK"], process.pid, status, waited_s,
                )  # fmt: skip
                process.send_signal(STACKS_SIGNAL)
                process.send_signal(signal.SIGCONT)
                time.sleep(1.0)
                process.kill()


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "LOCAL_RANK" in process.environ()
    except psutil.Error:
        return False
