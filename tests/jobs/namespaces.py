"""Nodes with network addresses of their own: a namespace each, joined by a bridge (root, Linux)."""

import os
import subprocess
from pathlib import Path

from tests.jobs.nodes import Cluster
from tests.ports import free_port

IP = next((p for p in ("/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip") if Path(p).exists()), "")


def ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if not IP:
        return "there is no `ip` (iproute2)"
    name = f"probe{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"{name[:12]}b", "type", "bridge")
        ip("link", "del", f"{name[:12]}b")
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made: {error.stderr.strip()}"
    return ""


class Network:
    """A bridge of this machine, 10.213.7.1, and namespaces at 10.213.7.2 and on."""

    def __init__(self) -> None:
        self.tag = f"t{os.getpid()}"
        self.names: list[str] = []

    def __enter__(self) -> "Network":
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", "10.213.7.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            ip("netns", "del", name)  # and its end of the cable, so both
        ip("link", "del", self.bridge)

    @property
    def bridge(self) -> str:
        return f"{self.tag}br"

    def add(self) -> tuple[str, str]:
        """A namespace's name and address."""
        number = len(self.names) + 2
        name, address = f"{self.tag}n{number}", f"10.213.7.{number}"
        inner = f"{self.tag}i{number}"
        ip("netns", "add", name)
        self.names.append(name)
        ip("link", "add", self.cable(name), "type", "veth", "peer", "name", inner)
        ip("link", "set", self.cable(name), "master", self.bridge, "up")
        ip("link", "set", inner, "netns", name)
        for command in (
            ("addr", "add", f"{address}/24", "dev", inner),
            ("link", "set", inner, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", name, *command)
        return name, address

    def cable(self, name: str) -> str:
        return f"{self.tag}o{name.rpartition('n')[2]}"

    def cut(self, name: str) -> None:
        ip("link", "set", self.cable(name), "down")

    def mend(self, name: str) -> None:
        ip("link", "set", self.cable(name), "up")


class SeparateNodes(Cluster):
    """A cluster whose head is on the bridge and whose nodes are in namespaces."""

    head_address = "10.213.7.1"

    def __init__(self, network: Network, nodes: int, **environment: str) -> None:
        self.network = network
        self.places: dict[int, tuple[str, str]] = {}  # of a node's process id
        super().__init__(nodes, **environment)

    def add_node(self, place: tuple[str, str] | None = None) -> subprocess.Popen:
        name, address = place or self.network.add()
        node = self.start(
            f"--address={self.head_address}:{self.port}", "--num-cpus=1",
            f"--node-ip-address={address}", f"--dashboard-agent-listen-port={free_port()}",
            f"--temp-dir={self.folder}-{len(self.nodes)}",
            prefix=(IP, "netns", "exec", name),
        )  # fmt: skip
        self.places[node.pid] = (name, address)
        return node
