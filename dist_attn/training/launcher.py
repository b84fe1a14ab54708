"""Start the ranks of one node, and turn how they ended into one exit code."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

from dist_attn.errors import ConfigError

logger = logging.getLogger(__name__)

#: Ranks without a GPU when nobody says how many.
DEFAULT_CPU_RANKS = 4
USER_ERROR_EXIT = 2


def ranks_per_node(asked: int | None) -> int:
    """What was asked for, or one rank per GPU, or four where there is none."""
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"--nproc-per-node takes a positive number, got {asked}")
        return asked
    import torch

    return torch.cuda.device_count() or DEFAULT_CPU_RANKS


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Run `dist-attn train` with these arguments in `num_ranks` ranks of this machine.

    The ranks are torchrun's, on a free port of the loopback interface. Unlike torchrun itself, a
    refusal of the input (exit code 2) stays one message and one exit code.

    Returns:
        The exit code of the first rank that failed, 128 + the signal that ended it, or 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What elastic reports in a page, this reports in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    options = ["--standalone", "--nproc-per-node", str(num_ranks), "--module", "dist_attn.cli"]
    try:
        run(parse_args([*options, "train", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code == USER_ERROR_EXIT:
            return USER_ERROR_EXIT
        if code < 0:
            name = signal.Signals(-code).name
            logger.error("rank %d (process %d) was ended by %s", rank, failure.pid, name)
            return 128 - code
        logger.error("rank %d (process %d) failed with exit code %d", rank, failure.pid, code)
        return code
    return 0
