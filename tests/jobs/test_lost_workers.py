"""Jobs whose processes are killed or lost: when they end, and the one line that says why."""

import asyncio
import errno
import os
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs import driver
from jobs import group as of_group
from jobs.group import FINISHED, Group, root_cause
from jobs.launch import finish, last_error
from jobs.lost import WorkersLost, of_supervisor
from jobs.restarts import Restarts
from jobs.spec import JOB_VARIABLE, SPEC_VARIABLE, JobSpec
from jobs.stopping import ASKED
from jobs.submit import _stream
from pipeline import storage
from pipeline.checkpoint_store import Progress, write
from pipeline.errors import Unreachable, UserError
from pipeline.recipes import recipe
from tests.error_table.memory import KILLED, Client, failing
from tests.jobs.nodes import options

HEALTH = "A worker health check failed."
SUPERVISOR_LOG = f"Runtime\nepoch 1\nUnexpected error occurred: {KILLED}"
NOISE = "2026-11-22 04:00:00,000\tINFO job_manager.py:581 -- Runtime env is setting up.\n"


def killed() -> WorkerGroupError:
    failure = WorkerHealthCheckFailedError(HEALTH, OutOfMemoryError(KILLED))
    return WorkerGroupError(KILLED, {0: failure})


def gone() -> WorkerGroupError:
    failure = WorkerHealthCheckFailedError(HEALTH, ActorDiedError())
    return WorkerGroupError("gone", {0: failure})


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "x")
    config = recipe("demo")
    spec = JobSpec(config=config.to_json(), folder=str(tmp_path / "run"), restarts=3)
    return Group(spec, config, use_gpu=False)


def test_a_second_kill_for_memory_at_one_step_ends_the_job(group):
    group.attempt = failing(group, killed(), killed())
    with pytest.raises(UserError) as told:
        group.train()
    line = str(told.value)
    assert "\n" not in line
    assert "killed for memory twice, at step 0" in line
    assert "node 127.0.0.1 ran low on memory (22.60GB used of 23.54GB)" in line
    assert "--engine.micro-batch (to 1)" in line


def test_kills_for_memory_of_a_run_that_gets_on_count_as_other_failures(group):
    group.attempt = failing(group, *(killed() for _ in range(4)), steps=10)
    with pytest.raises(UserError, match=r"since the checkpoint of step 0: 4, .* --restarts 3"):
        group.train()


def test_a_kill_for_memory_is_not_another_failure_twice(group, capsys):
    group.attempt = failing(group, killed(), gone(), gone(), gone())
    with pytest.raises(WorkersLost):
        group.train()
    assert capsys.readouterr().out.count("restarting") == 3


@pytest.mark.parametrize("failures", [[], [gone()]])
def test_a_stop_that_no_worker_has_answered_is_not_left_in_the_folder(group, failures):
    """`pipeline train` would hear it, and stop after its first step, at each start."""

    def attempt() -> str:
        group.ask_to_stop()
        for failure in failures:
            raise failure
        return ASKED  # while it waited for resources

    group.attempt = attempt
    assert not group.train()
    assert not group.request.path.exists()


def test_a_stop_that_comes_after_the_end_is_not_left_in_the_folder(group):
    """While what is left is sent to MLflow, which may take a minute."""
    group.attempt = lambda: FINISHED
    assert group.train()
    group.ask_to_stop()
    assert not group.request.path.exists()


def stale(*_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_stop_that_storage_did_not_take_is_passed_on_once_it_does(group, monkeypatch):
    """Else the job would train on until it is killed, and lose what it has not saved."""
    monkeypatch.setattr(of_group, "release", lambda: None)
    monkeypatch.setattr(of_group, "placement_groups", lambda _: ["one"])

    def fulfil(outcome):
        with monkeypatch.context() as patched, suppress(OSError):
            patched.setattr(os, "replace", stale)
            group.ask_to_stop()
        assert not group.request.path.exists()
        deadline = time.monotonic() + 20
        while not group.request.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        outcome.set_result(group.request.answer() if group.request.path.exists() else FINISHED)

    group.fulfil = fulfil
    assert not group.train()


def test_storage_that_fails_as_a_group_begins_is_a_failure_that_may_pass(
    group, monkeypatch, capsys
):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    monkeypatch.setattr(of_group, "release", lambda: None)
    monkeypatch.setattr(of_group, "placement_groups", lambda _: [])
    begin, left = group.fence.begin, [True, True]

    def seldom():
        if left:
            left.pop()
            stale()
        return begin()

    group.fence.begin = seldom
    group.trainer = lambda attempt: SimpleNamespace(
        fit=lambda: SimpleNamespace(return_value=FINISHED)
    )
    assert group.train()
    assert capsys.readouterr().out.count("Stale file handle; restart ") == 2


def test_a_new_checkpoint_is_getting_on(tmp_path):
    restarts = Restarts(tmp_path, 3)
    assert not restarts.stuck()
    write(tmp_path, Progress(5), {}, {})
    assert not restarts.stuck()
    assert restarts.stuck()


def test_workers_lost_too_often_are_no_bug(group, monkeypatch, capsys):
    group.attempt = failing(group, *(gone() for _ in range(4)))
    monkeypatch.setenv(SPEC_VARIABLE, group.spec.to_json())
    monkeypatch.setattr(driver, "run", lambda spec: group.train())
    assert driver.main() == 1
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert last.startswith("error: training has lost its workers: ")
    assert "step 0: 4, expected at most --restarts 3; the same command goes on" in last
    assert "Traceback" not in said
    assert "bug of ours" not in said
    assert HEALTH not in said


def test_a_run_killed_for_memory_is_a_line_without_traceback(group, monkeypatch, capsys):
    group.attempt = failing(group, killed(), killed())
    monkeypatch.setenv(SPEC_VARIABLE, group.spec.to_json())
    monkeypatch.setattr(driver, "run", lambda spec: group.train())
    assert driver.main() == 2
    first, last = capsys.readouterr().out.splitlines()
    assert "restart 1 of 3" in first
    assert last.startswith("error: a training process was killed for memory twice")


def test_a_bug_keeps_its_traceback(group, monkeypatch, capsys):
    monkeypatch.delenv("DETR_DEBUG", raising=False)
    group.attempt = failing(group, *(WorkerGroupError("x", {0: KeyError("k")}) for _ in range(4)))
    monkeypatch.setenv(SPEC_VARIABLE, group.spec.to_json())
    monkeypatch.setattr(driver, "run", lambda spec: group.train())
    monkeypatch.setenv("DETR_DEBUG", "0")  # restored: main sets it
    assert driver.main() == 1
    said = capsys.readouterr().out
    assert "Traceback" in said
    assert "bug of ours" in said.splitlines()[-1]


def test_the_process_that_was_killed_is_told_before_those_that_waited_for_it():
    memory = OutOfMemoryError(KILLED)
    waited = Unreachable("rank 0: another process is gone")
    assert root_cause(WorkerGroupError("", {0: waited, 1: memory})) is memory
    died = ActorDiedError()
    assert root_cause(WorkerGroupError("", {0: waited, 1: died, 2: memory})) is memory
    assert root_cause(WorkerGroupError("", {0: waited, 1: died})) is died
    mistake = UserError("got 1")
    assert root_cause(WorkerGroupError("", {0: memory, 1: mistake})) is mistake
    assert root_cause(ControllerError(memory)) is memory


def test_a_job_whose_supervisor_is_killed_for_memory_is_told_in_a_line(capsys):
    with pytest.raises(UserError) as told:
        finish(Client(SUPERVISOR_LOG), "many-0", stop_on_interrupt=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["Runtime", "epoch 1"]
    assert len(shown) == 3
    assert shown[2].startswith("error: the job's own process was killed: node 127.0.0.1 ran low")
    assert shown[2].removeprefix("error: ") in str(told.value)
    assert "close other programs there" in str(told.value)


def test_a_job_that_ended_without_a_word_is_told_as_ray_has_it():
    for message, said in (
        ("Unexpected error occurred: failed to get job supervisor.", "supervisor is gone (failed"),
        ("Job entrypoint command failed with exit code -9, last available logs (\nx", "code -9;"),
        ("", "FAILED; its log"),
    ):
        with pytest.raises(UserError) as told:
            finish(Client("epoch 1\n", message), "one-0", stop_on_interrupt=False)
        assert said in str(told.value)
        assert "\n" not in str(told.value)


def test_other_lines_of_a_log_are_no_words_of_the_supervisor():
    assert of_supervisor(f"worker: {KILLED}".splitlines()[0]) == ""
    assert "its node has died" in last_error(
        "Job supervisor actor died: The actor died because its node has died.\nmore\n"
    )


def test_what_ray_says_of_its_own_set_up_is_not_shown(capsys):
    asyncio.run(_stream(Client(f"{NOISE}Running entrypoint for job x\n"), "x", redraw=False))
    assert capsys.readouterr().out == "Running entrypoint for job x\n"


def test_the_workers_are_announced():
    assert driver.starting(1, {"CPU": 1}) == "starting a worker of 1 CPU"
    assert driver.starting(4, {"CPU": 8, "GPU": 1}) == "starting 4 workers of 8 CPU and 1 GPU each"


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_real_kill_for_memory_is_told_in_a_line(drawn, tmp_path, monkeypatch, run_command):
    """Ray's monitor is told that 1% of the memory is all there is; none is filled."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "500")
    done = run_command("jobs", *options(drawn, tmp_path / "run", 1, "--no-register"))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: job run-0 ended as FAILED: ")
    assert "node 127.0.0.1 ran low on memory (" in line
    assert "--engine.micro-batch" in line
    assert "Traceback" not in done.stdout
    assert "bug of ours" not in done.stdout
    assert "Workers killed" not in done.stdout
    assert "Runtime env is setting up" not in done.stdout
