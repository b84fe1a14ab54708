"""Start the ranks of one node, and turn how they ended into one exit code."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Sequence
from types import FrameType

import psutil

from dist_attn.errors import NODE_ERROR_EXIT, STOPPED_EXIT, USER_ERROR_EXIT, ConfigError
from dist_attn.training.slurm import NodePlace
from dist_attn.training.stop import STOP_SIGNALS

logger = logging.getLogger(__name__)

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


def launch(arguments: Sequence[str], num_ranks: int, node: NodePlace | None = None) -> int:
    """Run `dist-attn` with these arguments in `num_ranks` ranks of this machine.

    The ranks are torchrun's, on a free port of the loopback interface, or with those of other nodes
    at the place that `node` names. Unlike torchrun itself, it passes stop signals on to the ranks
    and waits for as long as they need, and an exit code that a rank chose stays that code, with the
    rank's one message.

    Returns:
        The exit code of the first rank that failed, 128 + the signal that ended it, or 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What elastic reports in a page, this reports in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    options = ["--standalone"]
    if node is not None:
        options = ["--nnodes", str(node.num_nodes), "--node-rank", str(node.node_rank)]
        options += ["--master-addr", node.master_addr, "--master-port", str(node.master_port)]
    options += ["--nproc-per-node", str(num_ranks), "--module", "dist_attn.cli"]
    parsed = parse_args([*options, *arguments])
    # The others are passed on by `_pass_on`; elastic itself would kill the ranks 30 s later.
    parsed.signals_to_handle = "SIGINT"
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
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


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()
    except psutil.Error:
        return False
