"""Where a training listens that runs outside of Ray: nowhere but on loopback."""

import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.pipeline.training_runs import ENVIRONMENT, ROOT, command

LOOPBACK = {"127.0.0.1", "::1"}
# Joins a group twice, as a program may, and says where it listens.
JOINING = """
import os, time
import psutil, torch
from pipeline.engine import start_process_group, stop_process_group
for _ in range(2):
    rank, world = start_process_group(torch.device("cpu"), 60.0)
    total = torch.full((1,), rank + 1.0)
    torch.distributed.all_reduce(total)
    assert total == world * (world + 1) / 2
    connections = psutil.Process().net_connections("inet")
    torch.distributed.barrier()
    if world == 1:
        stop_process_group()
found = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
os.write(1, (" ".join(found) + "\\n").encode())  # at once: two processes have this output
"""


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which it and what it started take connections."""
    found = set()
    with suppress(psutil.Error):  # it has ended
        for one in (process, *process.children(recursive=True)):
            connections = one.net_connections(kind="inet")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def listened(arguments: list[str]) -> set[str]:
    """Where a command listened, from its beginning to its end."""
    found: set[str] = set()
    with subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None:
            found |= listening(psutil.Process(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        assert process.returncode == 0, process.stdout.read()
    return found


@pytest.mark.slow
def test_train_and_replay_listen_on_loopback_alone(drawn, tmp_path):
    folder = tmp_path / "run"
    options = ["--optimizer.batch-size", 16, "--schedule.epochs", 1, "--engine.log-every", 1]
    workers = ["--engine.loader-workers", 1]
    assert listened(command(drawn, "demo", folder, *options, *workers)) == {"127.0.0.1"}  # gloo
    replay = [sys.executable, "-m", "pipeline", "replay", str(folder), "2"]
    assert listened(replay) == {"127.0.0.1"}


def can_rename() -> bool:
    probe = ["unshare", "--uts", "sh", "-c", "hostname probe"]
    found = shutil.which("unshare") is not None
    return found and subprocess.run(probe, capture_output=True).returncode == 0


def test_a_host_whose_name_is_another_address_stays_on_loopback():
    addresses = [a.address for each in psutil.net_if_addrs().values() for a in each
                 if a.family == socket.AF_INET and a.address not in LOOPBACK]  # fmt: skip
    # gloo asks for the host's name.
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname "$1" && shift && exec "$@"', "sh"]
    if not addresses or not can_rename():
        pytest.skip("needs root, unshare and an address beside loopback")
    script = [sys.executable, "-c", JOINING]
    done = subprocess.run(
        [*renamed, addresses[0], *script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["127.0.0.1"]


def test_processes_of_a_torchrun_without_ports_of_its_own_meet_on_loopback(tmp_path):
    """As docs/training.md says that torchrun itself listens nowhere."""
    script = tmp_path / "script.py"
    script.write_text(JOINING)
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    meeting = ["--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(tmp_path / "meeting")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *meeting, str(script)],
        cwd=ROOT, capture_output=True, text=True,
        env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["127.0.0.1"] * 2
