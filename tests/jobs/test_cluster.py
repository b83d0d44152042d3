"""A local Ray that gives itself up on a busy machine is started again."""

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from jobs import cluster
from pipeline.errors import UserError

GIVES_UP = "print('The current node timed out during startup.')"
COMES_UP = """
import http.server, os, sys
os.makedirs("api"); open("api/version", "w").close()
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])),
                                         http.server.SimpleHTTPRequestHandler)
print("Ray runtime started.", flush=True)
server.serve_forever()
"""


@pytest.fixture
def starts(monkeypatch):
    """`starts(programs)`: heads are these Python programs, one after the other; gives their
    folders."""
    folders: list[Path] = []

    def set_programs(programs):
        def start(folder):
            program = programs[len(folders)]
            folders.append(folder)
            [port] = cluster._free_ports(1)
            with (folder / cluster.HEAD_LOG).open("w") as log:
                head = subprocess.Popen(
                    [sys.executable, "-c", program, str(port)], stdout=log,
                    stderr=subprocess.DEVNULL, cwd=folder,
                )  # fmt: skip
            return head, cluster.LocalCluster(f"http://127.0.0.1:{port}", "")

        monkeypatch.setattr(cluster, "_start", start)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # to be put back
            monkeypatch.setenv(name, "")
        return folders

    return set_programs


def test_one_that_gives_up_is_started_again(starts):
    folders = starts([GIVES_UP, GIVES_UP, COMES_UP])
    with cluster.local_cluster() as (address, _):
        assert urllib.request.urlopen(f"{address}/api/version").status == 200
        assert [folder.exists() for folder in folders] == [False, False, True]
    assert not folders[-1].exists()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/api/version")


def test_what_it_said_last_is_told(starts):
    folders = starts([GIVES_UP] * cluster.STARTS)
    said = "did not start; it said: The current node timed out"
    with pytest.raises(UserError, match=said), cluster.local_cluster():
        pass
    assert len(folders) == cluster.STARTS
    assert not any(folder.exists() for folder in folders)
