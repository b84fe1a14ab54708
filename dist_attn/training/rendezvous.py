"""Stores that listen at one address, not at every address of the machine."""

from __future__ import annotations

import contextlib
import errno
import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

#: The name under which torch's launcher knows `_Rendezvous`.
BACKEND = "dist-attn"
_BACKLOG = 4096


def serve(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Keep a store that only `host` leads to; port 0 takes a free one.

    Where `host` is no address of this machine (behind a translation of addresses, say), the store
    listens at all of them.

    Raises:
        OSError: the port is taken.
    """
    listener = _listener(host, port)
    taken = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        taken,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # The store closes it.
        master_listen_fd=listener.detach(),
    )


def _listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", port), backlog=_BACKLOG)
    return listener


class _Rendezvous(RendezvousHandler):
    """Launchers that meet at the first one's address; its store serves their ranks as well."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._parameters = parameters
        self._store: dist.TCPStore | None = None

    def get_backend(self) -> str:
        """The name of this kind."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks use the launcher's store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet, and say where."""
        config, nodes = self._parameters.config, self._parameters.max_nodes
        node_rank, timeout_s = int(config["rank"]), float(config["timeout"])
        host, _, port = self._parameters.endpoint.rpartition(":")
        host = host.strip("[]")
        if self._store is None and node_rank == 0:
            self._store = serve(host, int(port), timeout_s)
        elif self._store is None:
            self._store = dist.TCPStore(
                host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s)
            )
        return RendezvousInfo(
            dist.PrefixStore(self._parameters.run_id, self._store),
            node_rank,
            nodes,
            RendezvousStoreInfo(host, self._store.port),
        )

    def is_closed(self) -> bool:
        """Whether nobody may come any more."""
        return False

    def set_closed(self) -> None:
        """Nothing: a launcher that ends takes its ranks with it."""

    def num_nodes_waiting(self) -> int:
        """Launchers that want to join a run that goes on: none may."""
        return 0

    def get_run_id(self) -> str:
        """The name of the run."""
        return str(self._parameters.run_id)

    def shutdown(self) -> bool:
        """Nothing to end but the store, which ends with the process."""
        return True


def register() -> None:
    """Make the kind known to torch's launcher."""
    with contextlib.suppress(ValueError):  # A second launch of this process.
        rendezvous_handler_registry.register(BACKEND, _Rendezvous)
