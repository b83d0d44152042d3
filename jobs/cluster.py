"""A Ray cluster of this machine alone, for as long as a `with` block lasts."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.errors import UserError
from pipeline.parent import end_with_parent

START_TIMEOUT = 150.0  # seconds until the node must be up
# Ray gives its node 30 s, which cannot be changed and is short on a machine with much else to do.
STARTS = 3
HEAD_LOG = "head.log"
STARTED = "Ray runtime started"  # in what `ray start` prints, once the node is up
STOP_TIMEOUT = 15.0  # seconds until what still runs is killed


def available_cpus() -> int:
    """CPUs that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


class LocalCluster(NamedTuple):
    """Where a head node of this machine is reached."""

    jobs: str
    """Address of its Ray Jobs API, http://127.0.0.1:PORT."""
    head: str
    """Address to join it by `ray.init`, 127.0.0.1:PORT."""


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """Starts a head node on loopback, yields its addresses, and stops all it started.

    Every port of Ray's is bound to loopback. Access also needs a random token, set in this
    process's environment: other users of the machine reach loopback, too. The head ends when this
    process dies.
    """
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for left in reversed(range(STARTS)):
        with ExitStack() as stack:
            # A short path: Ray's sockets lie below it, and a socket's path may have 107 characters.
            folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            head, cluster = _start(folder)
            stack.callback(_stop, head)
            if _is_up(cluster.jobs, head, folder, last=left == 0):
                yield cluster
                return


def _start(folder: Path) -> tuple[subprocess.Popen, LocalCluster]:
    """The process of a head node with its files in `folder`, and its addresses."""
    environment = dict(
        os.environ,
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
        RAY_DISABLE_IMPORT_WARNING="1",
        # Else Ray takes the machine's own address for 127.0.0.1, and listens on every interface.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    # All of them free ones: another cluster of this machine may have Ray's own defaults.
    port, dashboard, agent, client, seed = _free_ports(5)
    low = 10000 + seed % 100 * 200
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--min-worker-port={low}", f"--max-worker-port={low + 200}",
        f"--num-cpus={max(2, available_cpus())}", f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / HEAD_LOG).open("w") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )  # fmt: skip
    return head, LocalCluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _is_up(address: str, head: subprocess.Popen, folder: Path, last: bool) -> bool:
    """Waits until the node is up and its Jobs API answers. False where it has given up; `last`:
    raises `UserError` then."""
    request = urllib.request.Request(
        f"{address}/api/version",
        headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    output = folder / HEAD_LOG
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if head.poll() is not None:
            break
        time.sleep(0.2)
        # The API answers before the node is up, and stays if it never is.
        if STARTED in output.read_text(errors="replace"):
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(request, timeout=2)
                return True
    if head.poll() is not None and not last:
        return False
    tail = " | ".join(output.read_text(errors="replace").strip().splitlines()[-3:])
    raise UserError(f"a local Ray did not start; it said: {tail}")


def _stop(head: subprocess.Popen) -> None:
    """Ends the head and every process below it, first politely."""
    try:
        family = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    head.terminate()
    try:
        head.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    _, alive = psutil.wait_procs(family, timeout=2)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)
