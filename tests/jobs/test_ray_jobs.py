"""Jobs on a real local Ray: training by two workers, a killed worker, users' mistakes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import psutil
import pytest

from jobs.cluster import local_cluster
from jobs.spec import JobSpec
from jobs.submit import submit
from pipeline.checkpoint_store import check, checkpoint_steps
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.tracking import read_lines
from tests.jobs.nodes import Run, options

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster():
    before = {key: os.environ.get(key) for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    with socket.socket() as other:
        with suppress(OSError):  # taken already: as good
            other.bind(("", 52365))  # where the agent of another user's cluster listens
            other.listen()
        with local_cluster() as started:
            yield started.jobs
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


def arguments(drawn, folder, address, *more):
    return [
        "jobs", "submit", "demo", "--output", folder, "--address", address, "--workers", 2,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--optimizer.batch-size", 8, "--engine.log-every", 1, *more,
    ]  # fmt: skip


def listening(processes):
    """Addresses on which they take connections."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            connections = process.net_connections(kind="inet")
            found += [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
    return found


def test_a_job_trains_survives_a_killed_worker_and_is_tracked(drawn, cluster, tmp_path):
    folder = tmp_path / "runs" / "job"
    epochs = ("--schedule.epochs", 4)
    job = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments(drawn, folder, cluster, *epochs))],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not list((folder / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    # Of our own cluster: the machine may have others.
    family = psutil.Process().children(recursive=True)
    named = [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in p.info["name"]]
    workers = [p for p in named if p in family]
    assert len(workers) >= 2
    workers[0].suspend()  # or training might end while we look
    assert set(listening(family)) <= LOOPBACK  # while training, too
    workers[0].send_signal(signal.SIGKILL)
    output, _ = job.communicate(timeout=500)
    assert job.returncode == 0, output
    assert "restarting" in output
    assert "resumed after step" in output
    assert "images/s" in output
    assert "AP by class" in output
    assert "--backend-store-uri sqlite:///" in output
    best = Path(re.search(r"best checkpoint\s+(\S+)", output).group(1))
    assert check(best) is None
    assert (folder / "predictions.png").exists()
    steps = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert steps == list(range(1, 21))

    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("deformable-detr")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == steps
    assert len(client.get_metric_history(run.info.run_id, "val/AP")) == 4
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"predictions.png", "config.json", "best.json"} <= artifacts

    # Submitted once more, the finished run ends at once and changes nothing.
    again = subprocess.run(
        [sys.executable, "-m", *map(str, arguments(drawn, folder, cluster, *epochs))],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout
    after = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert after == steps
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_gpu_that_the_cluster_lacks_is_refused(drawn, cluster, tmp_path, run_command):
    done = run_command(*arguments(drawn, tmp_path / "run", cluster, "--engine.device", "cuda"))
    assert done.returncode == 2
    assert "expected 2, one for each worker" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_shards_that_the_cluster_does_not_see_are_refused(drawn, cluster, tmp_path, run_command):
    done = run_command(
        "jobs", "submit", "demo", "--output", tmp_path / "run", "--address", cluster,
        "--data.train", "/none", "--data.val", "/none",
    )  # fmt: skip
    assert done.returncode == 2
    assert "'/none' does not exist" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_job_without_room_says_so_is_listed_and_can_be_stopped(
    drawn, cluster, tmp_path, run_command
):
    job = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments(drawn, tmp_path / "wide", cluster)),
         "--workers", "8", "--cpus-per-worker", "64"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = next(line for line in job.stdout if "waiting for resources" in line)
    assert "8 workers of 64 CPU each; the cluster has room for 0 (nodes: 1)" in said
    listed = run_command("jobs", "status", "--address", cluster)
    assert listed.returncode == 0
    assert re.search(rf"^wide-0 +RUNNING +demo +{tmp_path / 'wide'}$", listed.stdout, re.M)
    unknown = run_command("jobs", "stop", "--job", "nothing-0", "--address", cluster)
    assert unknown.returncode == 2
    assert "no job 'nothing-0'" in unknown.stderr
    stopped = run_command("jobs", "stop", "--job", "wide-0", "--address", cluster)
    assert "STOPPED" in stopped.stdout
    assert "stopped as asked" in job.communicate(timeout=200)[0]


def test_an_interrupted_local_run_saves_leaves_nothing_behind_and_goes_on(
    drawn, tmp_path, run_command
):
    run = Run(tmp_path / "run")
    asked = options(drawn, run.folder, 6, "--workers", 2, "--no-register")
    command = [sys.executable, "-m", "jobs", *map(str, asked)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 500
    while run.step() < 3:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    cluster = psutil.Process(job.pid).children(recursive=True)
    names = {p.info["name"] for p in psutil.process_iter(["name"]) if p in cluster}
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 130
    assert {"gcs_server", "raylet"} <= names
    assert not psutil.wait_procs(cluster, timeout=120)[1]  # the system takes its time over them
    assert said.decode().splitlines()[-1] == (
        "interrupted; what it started is stopped; the same command goes on"
    )
    assert run.lines("event")[-1]["event"] == "stopped"
    assert checkpoint_steps(run.folder)[-1] == run.step() < 30
    resumed = run_command("jobs", "resume", run.folder, "--workers", 1)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert run.step() == 30
    assert [line["world"] for line in run.lines("event") if line["event"] == "start"] == [2, 1]


def test_an_address_that_does_not_answer_is_refused(drawn, tmp_path, run_command):
    started = time.monotonic()
    done = run_command(*arguments(drawn, tmp_path, "http://127.0.0.1:9"))
    assert done.returncode == 2
    assert "no Ray cluster answers at 'http://127.0.0.1:9'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert time.monotonic() - started < 60


def test_a_job_spec_survives_its_journey():
    spec = JobSpec(config=recipe("demo").to_json(), folder="/runs/x", workers=3, code="abc")
    assert JobSpec.from_json(spec.to_json()) == spec
    assert spec.run_config() == recipe("demo")


class StartingCluster:
    """A Jobs client whose cluster has no agent for the first `refusals` submissions."""

    def __init__(self, refusals: int, message: str = "500: No available agent to submit job"):
        self.refusals, self.message = refusals, message

    def list_jobs(self):
        return [SimpleNamespace(submission_id="run-0", metadata=None)]

    def submit_job(self, **job):
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError(self.message)
        return job["submission_id"]


class DroppingCluster:
    """One whose dashboard drops the connection of so many submissions, having taken them or not."""

    def __init__(self, refusals: int, takes: bool = False):
        self.refusals, self.takes, self.taken = refusals, takes, []

    def list_jobs(self):
        return [SimpleNamespace(submission_id=i, metadata=None) for i in ["run-0", *self.taken]]

    def submit_job(self, **job):
        dropped, self.refusals = self.refusals > 0, self.refusals - 1
        if self.takes or not dropped:
            self.taken.append(job["submission_id"])
        if dropped:
            raise ConnectionError("Connection aborted.")
        return job["submission_id"]


def test_a_cluster_that_is_still_starting_is_waited_for(monkeypatch):
    monkeypatch.setattr("jobs.submit.AGENT_TIMEOUT", 60.0)
    spec = JobSpec(config=recipe("demo").to_json(), folder="/runs/x")
    assert submit(StartingCluster(1), spec, "run") == "run-1"
    with pytest.raises(UserError, match=r"refuses the job: .*disk"):
        submit(StartingCluster(1, "disk full"), spec, "run")
    assert submit(DroppingCluster(refusals=2), spec, "run") == "run-1"
    dropped = DroppingCluster(refusals=1, takes=True)
    assert submit(dropped, spec, "run") == "run-1"
    assert dropped.taken == ["run-1"]  # not submitted twice
    monkeypatch.setattr("jobs.submit.AGENT_TIMEOUT", 0.0)
    with pytest.raises(ConnectionError):
        submit(DroppingCluster(refusals=1), spec, "run")
    with pytest.raises(UserError, match="takes no jobs"):
        submit(StartingCluster(9), spec, "run")
