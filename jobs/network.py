"""Which network interface a worker speaks on: the one of its node's address in the cluster."""

import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import ray
from ray.train.v2._internal.execution.callback import WorkerCallback


def interface_of(address: str, interfaces: Mapping[str, Iterable[Any]]) -> str:
    """Name of the interface whose network has the address, of `psutil.net_if_addrs()`; empty
    without one. The smallest network counts."""
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


class NodeInterface(WorkerCallback):
    """Tells gloo and NCCL, before they make their group. Left alone, gloo takes the interface that
    the host's name stands for, often loopback; Ray Train sets neither."""

    def after_init_train_context(self) -> None:
        name = interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs())
        if name:
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)
