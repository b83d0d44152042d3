"""The process group of a worker group, on the network of its nodes and on no other."""

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
from ray.train.backend import Backend, BackendConfig

_listening: list[socket.socket] = []  # in the first worker, until it joins


@dataclass
class ProcessGroupConfig(BackendConfig):
    """`backend`: of torch.distributed; `timeout`: seconds for one collective.

    Ray's own `TorchConfig` has the group's store listen on every interface of the first node,
    leaves the interface to gloo and NCCL, and takes up to 30 s to part from a group that hangs.
    """

    backend: str
    timeout: float

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Ray Train's hook that joins the workers to one torch process group."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        address, port = worker_group.execute_single(0, listen)
        world = len(worker_group)
        place = (world, address, port, backend_config.backend, backend_config.timeout)
        ray.get([worker_group.execute_single_async(r, join, r, *place) for r in range(world)])


def listen() -> tuple[str, int]:
    """In the first worker: opens the port at which the others will meet it, on its node's address
    in the cluster."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listening.append(socket.create_server((address, 0), family=family))
    return address, _listening[-1].getsockname()[1]


def join(rank: int, world: int, address: str, port: int, backend: str, timeout: float) -> None:
    """In each worker: joins the group, and sets what torchrun would set."""
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    interface = interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs())
    if interface:  # else gloo takes the one that the host's name stands for, often loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    limit = timedelta(seconds=timeout)
    listener = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(address, port, world, rank == 0, limit, master_listen_fd=listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)


def interface_of(address: str, interfaces: Mapping[str, Iterable[Any]]) -> str:
    """Name of the interface that has the address, or else whose network has it (the smallest one),
    among those of `psutil.net_if_addrs()`; empty without one."""
    wanted, found = ipaddress.ip_address(address), []
    for name, entries in interfaces.items():
        for entry in entries:
            try:
                network = ipaddress.ip_network(f"{entry.address}/{entry.netmask}", strict=False)
            except ValueError:  # a hardware address
                continue
            if wanted in network:
                found.append((entry.address == address, network.prefixlen, name))
    return max(found)[2] if found else ""
