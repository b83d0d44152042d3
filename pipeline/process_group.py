"""torch's process group where no launcher has made one: of one process, or of torchrun's.

What can be on loopback is there. A group has neither users nor passwords.
"""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

LOOPBACK, INTERFACE = "127.0.0.1", "lo"


def join_group(backend: str, timeout: float) -> None:
    """Joins the group in the environment (RANK, WORLD_SIZE, … as torchrun sets them), or one of
    this process alone.

    backend: of torch.distributed. timeout: seconds to wait for others in it.
    """
    limit = timedelta(seconds=timeout)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store: dist.Store | None = None  # as the environment says
    if world == 1:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        store = dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        stay_on_this_machine()
        if not store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store = store_on_loopback(rank, world, int(os.environ["MASTER_PORT"]), limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def stay_on_this_machine() -> None:
    """gloo and NCCL on loopback, unless the environment names an interface; gloo would take the one
    that the host's name stands for, and NCCL the first that is not loopback."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", INTERFACE)


def store_on_loopback(rank: int, world: int, port: int, limit: timedelta) -> dist.TCPStore:
    """The store where the processes of a group on this machine meet, in the first of them. torch's
    own listens on every interface."""
    listener = socket.create_server((LOOPBACK, port)).detach() if rank == 0 else None
    return dist.TCPStore(LOOPBACK, port, world, rank == 0, limit, master_listen_fd=listener)
