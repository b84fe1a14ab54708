"""Ranks meet at an address, and the one that does not come is named by those that do."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch.distributed as dist

from dist_attn.errors import NodeError
from dist_attn.training.meeting import meet
from tests.ranks import run_ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meeting(port: int, world_size: int, timeout_s: float) -> tuple[list[str], str] | str:
    """The nodes and a note passed by the store, or the refusal."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "MASTER_ADDR": "127.0.0.1"})
        os.environ.update(MASTER_PORT=str(port), SLURMD_NODENAME=f"n{rank}")
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        try:
            store, nodes = meet(rank, world_size, timeout_s)
        except NodeError as error:
            return str(error)
        store.set(f"note/{rank}", f"from {rank}")
        note = store.get(f"note/{(rank + 1) % world_size}").decode()
        dist.barrier()
    return nodes, note


def test_all_ranks_learn_each_others_nodes() -> None:
    found = run_ranks(meeting, 3, free_port(), 3, 30.0)
    assert found == [(["n0", "n1", "n2"], f"from {(r + 1) % 3}") for r in range(3)]


def test_a_rank_that_never_comes_is_named_by_the_others_in_time() -> None:
    begun = time.monotonic()
    texts = run_ranks(meeting, 3, free_port(), 4, 1.5)
    assert time.monotonic() - begun < 15
    for text in texts:
        assert text.startswith("rank 3 of 4 did not come within 1.5 s; ranks came from n0, n1, n2")
