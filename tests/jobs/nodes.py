"""A Ray cluster of several nodes on one machine, started as on real ones: by `ray start`."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.config import RunConfig
from pipeline.data.order import Stream
from pipeline.data.shards import ShardSet
from pipeline.tracking import read_lines
from tests.pipeline.training_runs import require_same_ends
from tests.ports import free_port, free_ports

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"


class Cluster:
    """A head without CPUs, where drivers run, and nodes of one CPU for one worker each.

    Leaving it as a context ends all of its processes at once, as a power cut does.
    """

    head_address = "127.0.0.2"

    def __init__(self, nodes: int, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: it has sockets
        self.environment = {
            **os.environ,
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            **environment,
        }
        self.nodes: list[subprocess.Popen] = []
        self.drivers: list[subprocess.Popen] = []
        self.port, self.dashboard, agent, client = free_ports(4)
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.head = self.start(
            "--head", "--num-cpus=0", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", f"--node-ip-address={self.head_address}",
            f"--temp-dir={self.folder}",
        )  # fmt: skip
        self.wait(self.answers)
        for _ in range(nodes):
            self.add_node()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *options: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
        """`ray start` in the foreground; `prefix` goes before the command."""
        command = [*prefix, str(RAY), "start", "--block", "--disable-usage-stats", *options]
        log = (self.folder / f"start-{len(self.nodes)}.log").open("w")
        node = subprocess.Popen(
            command, env=self.environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def add_node(self) -> subprocess.Popen:
        # Addresses of loopback, all different; not 127.0.0.1, which Ray would replace.
        own = f"127.0.0.{len(self.nodes) + 2}"
        return self.start(
            f"--address={self.head_address}:{self.port}", "--num-cpus=1",
            f"--node-ip-address={own}", f"--dashboard-agent-listen-port={free_port()}",
            # As machines do not share theirs: one node's agent would remove another's job files.
            f"--temp-dir={self.folder}-{len(self.nodes)}",
        )  # fmt: skip

    def answers(self) -> bool:
        token = self.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            f"{self.address}/api/version", headers={"Authorization": f"Bearer {token}"}
        )
        try:
            urllib.request.urlopen(request, timeout=2)
        except OSError:
            return False
        return True

    def wait(self, condition, job: subprocess.Popen | None = None, seconds: float = 400.0) -> float:
        """Waits for a condition while the job runs, and returns how long that took."""
        started = time.monotonic()
        while not condition():
            assert job is None or job.poll() is None, job.log.read_text()
            if time.monotonic() - started > seconds:
                told = job.log.read_text() if job else ""
                raise AssertionError(f"{condition} not within {seconds} s: {told}")
            time.sleep(0.05)
        return time.monotonic() - started

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of this cluster whose command line has `name` in it."""
        found = []
        for node in self.nodes:
            if node.poll() is None:
                family = psutil.Process(node.pid).children(recursive=True)
                found += [p for p in family if name in command_line(p)]
        return found

    def node_of(self, process: psutil.Process) -> subprocess.Popen:
        above = {p.pid for p in process.parents()}
        return next(node for node in self.nodes if node.pid in above)

    def kill_node(self, node: subprocess.Popen) -> None:
        """As when its machine loses power: every process of it at once."""
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for send in (psutil.Process.suspend, psutil.Process.kill):
            for process in family:
                with suppress(psutil.NoSuchProcess):  # ended by itself meanwhile
                    send(process)
        node.wait()

    def stop(self) -> None:
        for node in self.nodes[::-1]:
            if node.poll() is None:
                self.kill_node(node)
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        for folder in self.folder.parent.glob(f"{self.folder.name}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def jobs(self, *arguments: object) -> subprocess.Popen:
        """`python -m jobs …` against this cluster, its output in a file."""
        log = self.folder / f"jobs-{len(self.drivers)}.log"
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *map(str, arguments), "--address", self.address],
            cwd=ROOT, env=self.environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        process.log = log
        self.drivers.append(process)
        return process


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


class Run:
    """What a run's folder shows of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lines(self, kind: str) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [x for x in read_lines(path) if x["kind"] == kind] if path.exists() else []

    def step(self) -> int:
        return max((x["step"] for x in self.lines("train")), default=0)

    def worlds(self) -> list[int]:
        """Numbers of workers, start by start, as far as the log still has them."""
        return [x["world"] for x in self.lines("event") if x["event"] == "start"]

    def reached(self, step: int):
        """A condition: this step was logged."""
        return lambda: self.step() >= step

    def went_on(self, since: float):
        """A condition: training started after the time `since` and has logged a step."""

        def condition() -> bool:
            starts = [x["time"] for x in self.lines("event") if x["event"] == "start"]
            first = next((t for t in starts if t > since), None)
            return first is not None and any(x["time"] > first for x in self.lines("train"))

        return condition

    def samples(self) -> Counter[tuple[int, int]]:
        """How often each (epoch, sample) was trained on, by the steps of the log, which must be all
        of them."""
        identity = json.loads((self.folder / "config.json").read_text())
        config = RunConfig.from_json(json.dumps(identity["config"]))
        shards = ShardSet(config.data.train)
        stream = Stream(shards.shard_sizes, config.seed, config.data.shuffle_window)
        size = config.optimizer.batch_size
        batches = [stream.batch(x["step"] - 1, size).tolist() for x in self.lines("train")]
        return Counter((epoch, sample) for batch in batches for epoch, sample in batch)


def options(drawn, folder: Path, epochs: int, *more: object) -> list[object]:
    """Of `python -m jobs submit` for a short run that logs each step."""
    return [
        "submit", "demo", "--output", folder,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--optimizer.batch-size", 8, "--engine.log-every", 1, "--schedule.epochs", epochs, *more,
    ]  # fmt: skip


def assert_same(run: Run, uninterrupted: Run) -> None:
    """Weights, the optimizer's state and logged numbers equal bit by bit; every step once, and in
    every epoch every sample once."""
    steps = [x["step"] for x in run.lines("train")]
    assert steps == list(range(1, len(steps) + 1))
    samples, epochs = run.samples(), run.lines("event")[-1]["epoch"]
    assert set(samples.values()) == {1}
    per_epoch = Counter(epoch for epoch, _ in samples)
    assert sorted(per_epoch) == list(range(int(epochs)))
    assert len(set(per_epoch.values())) == 1
    require_same_ends(run.folder, uninterrupted.folder)


def send(process: psutil.Process, number: int = signal.SIGKILL) -> float:
    """Sends a signal and returns the time of day."""
    process.send_signal(number)
    return time.time()


def report(fault: str, seconds: float) -> None:
    """Of the table in docs/cluster.md; `pytest -s` shows it, and RECOVERY names a file for it."""
    print(f"\nrecovery: {fault}: {seconds:.1f} s", flush=True)
    if "RECOVERY" in os.environ:
        with open(os.environ["RECOVERY"], "a") as file:
            file.write(json.dumps({"fault": fault, "seconds": round(seconds, 1)}) + "\n")
