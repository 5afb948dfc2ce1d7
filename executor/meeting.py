"""Where the ranks of a run on one host meet: a store of the launcher's that listens on loopback alone.

torch's own rendezvous listens on all interfaces, and whoever reaches a store may write into it.
"""

from __future__ import annotations

import socket

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
NAME = "foreplan-loopback"
"""What the agent calls this rendezvous."""


class Meeting(RendezvousHandler):
    """The rendezvous of one agent, which is there already: nobody is waited for."""

    def __init__(self, run: str) -> None:
        self.run = run
        listening = socket.create_server((LOOPBACK, 0))
        self.port = listening.getsockname()[1]
        self.store = TCPStore(
            LOOPBACK, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )

    def get_backend(self) -> str:
        """Its name."""
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Ranks use the launcher's store, so that none of them opens another."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store and where ranks find it."""
        found = RendezvousStoreInfo(LOOPBACK, self.port)
        return RendezvousInfo(PrefixStore(self.run, self.store), 0, 1, found)

    def is_closed(self) -> bool:
        """Never: it ends with the launch."""
        return False

    def set_closed(self) -> None:
        """There is nobody to be told."""

    def num_nodes_waiting(self) -> int:
        """Nobody else can come."""
        return 0

    def get_run_id(self) -> str:
        """The launch's own name."""
        return self.run

    def shutdown(self) -> bool:
        """The store goes with its last user."""
        return True


def _made(parameters: RendezvousParameters) -> RendezvousHandler:
    return Meeting(parameters.run_id)


rendezvous_handler_registry.register(NAME, _made)
