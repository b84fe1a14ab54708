"""How ranks find each other, and how a rank that never comes is named."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta

import torch.distributed as dist

from dist_attn.errors import ConfigError, NodeError
from dist_attn.training.rendezvous import serve
from dist_attn.training.slurm import node_name

#: How long the first rank waits for the others to hear a bad verdict before it goes.
_FAREWELL_S = 5.0


def meet(rank: int, world_size: int, timeout_s: float) -> tuple[dist.Store, list[str]]:
    """Wait for every rank at MASTER_ADDR and MASTER_PORT, as torchrun or SLURM set them.

    Returns:
        The store that the ranks share, and each rank's node.

    Raises:
        NodeError: on every rank that came, naming those that did not, or the place where rank 0
            should be.

    Collective: by all ranks.
    """
    store = _open_store(rank, timeout_s)
    store.set(f"here/{rank}", node_name(os.environ))
    if rank == 0:
        missing = _missing(store, world_size, timeout_s)
        store.set("roll", json.dumps(missing))
        heard = world_size - len(missing) - 1
        deadline = time.monotonic() + _FAREWELL_S
        while missing and store.add("heard", 0) < heard and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        try:
            store.wait(["roll"], timedelta(seconds=timeout_s + _FAREWELL_S))
            missing = json.loads(store.get("roll"))
            store.add("heard", 1)
        except dist.DistError as error:
            raise NodeError(f"rank 0 went away while the ranks gathered: {error}") from None
    nodes = {r: store.get(f"here/{r}").decode() for r in range(world_size) if r not in missing}
    if missing:
        here = sorted(set(nodes.values()))
        raise NodeError(
            f"rank {_listed(missing)} of {world_size} did not come within {timeout_s:g} s; ranks "
            f"came from {', '.join(here)}; look at the logs of the missing ranks, or check their "
            f"nodes with `dist-attn preflight`"
        )
    return dist.PrefixStore("run", store), [nodes[r] for r in range(world_size)]


def _open_store(rank: int, timeout_s: float) -> dist.Store:
    names = ("MASTER_ADDR", "MASTER_PORT")
    missing = [n for n in names if n not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set, which torchrun and srun jobs do for ranks"
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent often keeps a store there already, over restarts of the ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not agent
    try:
        if keeps:
            store = serve(host, port, timeout_s)
        else:
            timeout = timedelta(seconds=timeout_s)
            store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        return dist.PrefixStore(f"attempt-{attempt}", store)
    except (dist.DistError, OSError) as error:
        what = "listen" if keeps else "reach rank 0"
        text = str(error).splitlines()[0]
        raise NodeError(
            f"{node_name(os.environ)} could not {what} at {host}:{port} within {timeout_s:g} s "
            f"({text}); check the address, or choose another MASTER_PORT"
        ) from None


def _missing(store: dist.Store, world_size: int, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    absent = list(range(world_size))
    while absent:
        absent = [r for r in absent if not store.check([f"here/{r}"])]
        if time.monotonic() > deadline:
            break
        if absent:
            time.sleep(0.02)
    return absent


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:20]))
    return shown + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
