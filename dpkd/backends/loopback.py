"""How the workers of one machine find one another: a key-value store that nobody else reaches.

The stores that torch opens by itself listen on every interface, and whoever reaches one may change what the workers
agree on, some of it pickled.
"""

import socket
import uuid

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """The meeting of one agent with itself, over a store on loopback that its workers share."""

    def __init__(self) -> None:
        self._run_id = uuid.uuid4().hex
        listener = socket.create_server((LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    @property
    def use_agent_store(self) -> bool:
        """True: the workers open no store of their own."""
        return True

    def get_backend(self) -> str:
        """Names the kind of rendezvous."""
        return "loopback"

    def get_run_id(self) -> str:
        """Tells this session from any other."""
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, and that this agent is the only one."""
        place = RendezvousStoreInfo(LOOPBACK, self._port)
        store = dist.PrefixStore(self._run_id, self._store)  # type: ignore[attr-defined]
        return RendezvousInfo(store, 0, 1, place)

    def is_closed(self) -> bool:
        """False: nobody else would close it."""
        return False

    def set_closed(self) -> None:
        """Does nothing."""

    def num_nodes_waiting(self) -> int:
        """None ever waits."""
        return 0

    def shutdown(self) -> bool:
        """True: the store ends with this object."""
        return True
