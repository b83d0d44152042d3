"""What decides whether a job starts over, stops or waits, without a cluster."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import entry, resources
from jobs.__main__ import run_submit
from jobs.fence import Fence
from jobs.lost import in_a_line
from jobs.process_group import interface_of
from jobs.resources import Waiting, room, wants_gpu
from jobs.restarts import Restarts
from jobs.save_first import SaveFirst
from jobs.spec import JOB_VARIABLE, SPEC_VARIABLE, JobSpec
from jobs.stopping import ASKED, PREEMPTED, StopFile
from jobs.submit import submit
from pipeline import storage
from pipeline.checkpoint_store import Progress, write
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.tracking import MetricsLog

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(folder: Path, step: int) -> Path:
    return write(folder, Progress(step), {}, {})


def test_failures_count_from_the_newest_checkpoint(tmp_path):
    restarts = Restarts(tmp_path, 2)
    for step in range(1, 30):  # a preemption after each checkpoint: for ever
        checkpoint(tmp_path, step)
        assert restarts.allowed()
    assert restarts.allowed()
    assert "restart 2 of 2 since the checkpoint of step 29" in str(restarts)
    assert not restarts.allowed()
    assert not Restarts(tmp_path, 0).allowed()


def test_a_damaged_checkpoint_is_none_to_count_from(tmp_path):
    """Else those that come after it, of lower steps, would not count, and the job would end."""
    checkpoint(tmp_path, 5)
    (checkpoint(tmp_path, 30) / "training.pt").write_bytes(b"cut short")
    restarts = Restarts(tmp_path, 1)
    for step in (6, 7, 8):
        checkpoint(tmp_path, step)
        assert restarts.allowed()
    assert "restart 1 of 1 since the checkpoint of step 8" in str(restarts)
    assert not restarts.allowed()


def away(path, *_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def test_storage_that_is_away_is_one_failure_more(tmp_path, monkeypatch):
    """Not a traceback in the place of the restart; what counts is known again afterwards."""
    checkpoint(tmp_path, 5)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    restarts = Restarts(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", away)
        assert Restarts(tmp_path, 1).allowed()
        assert restarts.allowed()
        assert restarts.allowed()
        assert not restarts.allowed()
    checkpoint(tmp_path, 6)
    assert restarts.allowed()
    assert "restart 1 of 2 since the checkpoint of step 6" in str(restarts)


def test_storage_that_is_away_does_not_make_a_run_stuck(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    restarts, log = Restarts(tmp_path, 3), MetricsLog(tmp_path)
    log.write("train", 100, 1.0, loss=1.0)
    assert not restarts.stuck()
    log.write("train", 200, 2.0, loss=1.0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", away)
        assert not restarts.stuck()
    assert not restarts.stuck()
    assert restarts.stuck()


def test_a_preemption_is_told_after_the_storage_was_away(tmp_path, monkeypatch):
    status = SimpleNamespace(get_preemption_info=lambda: "soon")
    callback = SaveFirst(tmp_path, 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", away)
        callback.after_worker_group_poll_status(status)
    assert not callback.stop.path.exists()
    callback.after_worker_group_poll_status(status)
    assert callback.stop.answer() == PREEMPTED
    callback.after_worker_group_poll_status(status)
    assert not callback.stop.path.exists()  # it is told once


def test_a_stop_is_answered_with_its_reason_once(tmp_path):
    stop = StopFile(tmp_path)
    stop.ask(PREEMPTED)
    assert not stop.wait(0.0)
    assert stop.answer() == PREEMPTED
    assert stop.wait(0.0)
    assert stop.answer() == ASKED  # no file: by a signal
    stop.path.touch()  # by hand
    assert stop.answer() == ASKED
    assert not stop.path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["ray"]  # what a run folder may have before


class Drivers:
    """Stands for `subprocess` in the entry point: a process for each of these commands."""

    def __init__(self, *commands: str) -> None:
        self.left, self.keys = list(commands), {}

    def Popen(self, command: list[str], env: dict[str, str], preexec_fn) -> subprocess.Popen:
        assert command == [sys.executable, "-m", "jobs.driver"]
        assert env[JOB_VARIABLE] == self.keys.setdefault("job", env[JOB_VARIABLE])
        return subprocess.Popen(["sh", "-c", self.left.pop(0)], preexec_fn=preexec_fn)


@pytest.mark.parametrize(
    ("commands", "status", "said"),
    [
        (["exit 0"], 0, 0),
        (["exit 2"], 2, 0),  # a user's mistake comes again
        (["kill -9 $$", "kill -11 $$", "exit 0"], 0, 2),
        (["kill -40 $$", "exit 0"], 0, 1),  # a real-time signal, which has no name
        (["kill -9 $$"] * 3, 1, 3),
    ],
)
def test_a_killed_driver_is_started_again(commands, status, said, tmp_path, monkeypatch, capsys):
    spec = JobSpec(config=recipe("demo").to_json(), folder=str(tmp_path), restarts=2)
    monkeypatch.setenv(SPEC_VARIABLE, spec.to_json())
    drivers = Drivers(*commands)
    monkeypatch.setattr(entry, "subprocess", drivers)
    monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
    assert entry.main() == status
    assert drivers.left == []
    told = re.findall(r"the driver was killed by (SIG\w+|signal 40);", capsys.readouterr().out)
    assert len(told) == said


def test_a_stop_that_comes_between_two_drivers_is_passed_on(tmp_path, monkeypatch):
    """What decides about the second one reads all of a checkpoint, which takes seconds."""
    spec = JobSpec(config=recipe("demo").to_json(), folder=str(tmp_path))
    monkeypatch.setenv(SPEC_VARIABLE, spec.to_json())
    monkeypatch.setattr(entry, "subprocess", Drivers("kill -9 $$", "exec sleep 60"))
    monkeypatch.setattr(Restarts, "allowed", lambda _: os.kill(os.getpid(), signal.SIGTERM) is None)
    before = {number: signal.getsignal(number) for number in entry.SIGNALS}
    try:
        assert entry.main() == 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_earlier_attempt_of_the_same_job_is_over(tmp_path):
    fence, other = Fence(tmp_path, "one"), Fence(tmp_path, "other")
    first = fence.begin()
    assert not fence.over(first)
    theirs = other.begin()
    assert not fence.over(first)  # the folder's lock decides between jobs
    second = fence.begin()
    assert fence.over(first)
    assert not fence.over(second)
    assert not other.over(theirs)
    fence.path.write_text("{")
    assert not fence.over(first)
    shutil.rmtree(tmp_path / "ray")
    assert not fence.over(first)


def test_a_process_ends_with_its_attempt(tmp_path):
    fence = Fence(tmp_path, "one")
    code = (
        "import sys, time; from pathlib import Path; import jobs.fence as fence\n"
        "fence.LOOK_EVERY = 0.1\n"
        "fence.Fence(Path(sys.argv[1]), 'one').end_process_when_over(int(sys.argv[2]))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(fence.begin())],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    fence.begin()
    assert process.wait(120) == 1


def test_failures_are_told_in_a_line():
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: X\n"
    gone = (
        f"A worker health check failed.\n{died}The actor died because its node has died. Node Id: 7"
    )
    assert in_a_line(RuntimeError(gone)) == "a worker died because its node has died"
    assert (
        in_a_line(RuntimeError(died)) == "The actor died unexpectedly before finishing this task."
    )
    memory = (
        "A worker health check failed.\n6 worker(s) were killed due to the node running low on "
        "memory. Memory on the node (IP: 10.0.0.1, ID: 3d40) was 21.93GB used / 23.54GB limit "
    )
    assert in_a_line(RuntimeError(memory)) == (
        "a worker was killed: node 10.0.0.1 ran low on memory (21.93GB used of 23.54GB)"
    )
    assert in_a_line(RuntimeError()) == "RuntimeError"
    bare = "A worker health check failed.\nThe actor is unavailable: keepalive watchdog timeout.\nX"
    assert in_a_line(RuntimeError(bare)) == "The actor is unavailable: keepalive watchdog timeout."


def node(alive: bool = True, **has: float) -> dict:
    return {"Alive": alive, "Resources": has}


def test_room_is_counted_node_by_node():
    nodes = [node(CPU=3, GPU=1), node(CPU=3), node(CPU=8, GPU=4), node(False, CPU=8, GPU=8)]
    assert room({"CPU": 2}, nodes) == 1 + 1 + 4
    assert room({"CPU": 2, "GPU": 1}, nodes) == 1 + 0 + 4
    assert room({"CPU": 9}, nodes) == 0


def test_a_job_that_waits_says_once_what_for(monkeypatch, capsys):
    monkeypatch.setattr(resources, "PATIENCE", 0.0)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [node(CPU=4), node(CPU=1)])
    monkeypatch.setattr(resources.ray, "available_resources", lambda: {"CPU": 1.0})
    waiting = Waiting({"CPU": 2}, 3)
    for has in (False, False, True, True):
        waiting.look(has)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "3 workers of 2 CPU each; the cluster has room for 2 (nodes: 2)" in said[0]
    assert "have their resources, after" in said[1]
    Waiting({"CPU": 2}, 2).look(False)
    assert "room for 2, but only 1 CPU free of other jobs" in capsys.readouterr().out
    Waiting({"CPU": 2}, 2).look(True)
    Waiting({"CPU": 1}, 1).look(False)  # starting
    assert capsys.readouterr().out == ""


def test_gpus_are_waited_for_where_the_cluster_has_some():
    config = recipe("demo")
    assert not wants_gpu(config, 4, 0)
    assert wants_gpu(config, 4, 1)


def test_a_worker_speaks_on_its_nodes_interface():
    def at(address: str, netmask: str) -> SimpleNamespace:
        return SimpleNamespace(address=address, netmask=netmask)

    interfaces = {
        "lo": [at("127.0.0.1", "255.0.0.0"), at("::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")],
        "eth0": [at("02:fc:00:00:00:01", "ff:ff:ff:ff:ff:ff"), at("10.0.0.5", "255.255.0.0")],
        "ib0": [at("10.0.1.5", "255.255.255.0")],
    }
    assert interface_of("10.0.0.5", interfaces) == "eth0"
    assert interface_of("10.0.1.5", interfaces) == "ib0"
    assert interface_of("127.0.0.3", interfaces) == "lo"
    assert interface_of("192.168.0.1", interfaces) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-workers", 3), "min-workers: got 3, expected 0 to --workers 2"),
        (("--grace", 0), "grace 0 s"),
        (("--optimizer.batch-size", 1), "got 1 images for 2 processes"),
        (("--tracking-uri", "https://me:pa55@mlflow"), "got a user or password in it"),
    ],
)
def test_mistakes_are_found_before_a_cluster_is_asked(arguments, message, tmp_path):
    given = ["demo", "--output", str(tmp_path), "--workers", "2", *map(str, arguments)]
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        run_submit(given)
    assert "pa55" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_job_brings_no_secret_of_its_submitters_environment(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "S3CRET")
    sent = []
    client = SimpleNamespace(
        list_jobs=list, submit_job=lambda **job: sent.append(job) or job["submission_id"]
    )
    spec = JobSpec(config=recipe("demo").to_json(), folder="/runs/x")
    assert submit(client, spec, "run") == "run-0"
    assert "/runs/x" in str(sent)
    assert "S3CRET" not in str(sent)


def test_one_folder_has_one_job():
    running = SimpleNamespace(
        submission_id="run-0",
        metadata={"folder": "/runs/x"},
        status=SimpleNamespace(is_terminal=lambda: False),
    )
    client = SimpleNamespace(list_jobs=lambda: [running])
    spec = JobSpec(config=recipe("demo").to_json(), folder="/runs/x")
    with pytest.raises(UserError, match="job run-0 trains in /runs/x already"):
        submit(client, spec, "run")
