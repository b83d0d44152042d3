"""What a grid says of its cells after it was interrupted or killed: what is so, at any instant."""

import errno
import itertools
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs import grid_command, grid_run, grid_status
from jobs.grid_command import run_grid, write_grid
from jobs.grid_run import GridRunner
from jobs.grid_state import (
    DONE,
    FAILED,
    NOT_BEGUN,
    RESUME,
    RUNNING,
    STOPPED,
    Code,
    Record,
    look,
    nothing_runs,
)
from jobs.grid_status import rows, status
from pipeline.errors import UserError
from tests.jobs.made_up_grids import (
    CODE,
    DATA,
    ScriptedCluster,
    grid_of,
    outcomes,
    pretend,
    scripted,
)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(grid_run.time, "sleep", lambda _: None)
    monkeypatch.setattr(Code, "present", staticmethod(lambda: CODE))  # it reads every source
    return scripted(tmp_path, monkeypatch)


def states(folder, found) -> dict[str, str]:
    write_grid(folder, "made", found[0].cell, found, ["made"])
    return {row.cell: row.state for row in rows(folder)}


def breaking(client, broken, arrives: bool = False):
    """A submission that is interrupted before the cluster has the job, or after."""
    whole = client.submit_job

    def submit_job(**job):
        if arrives:
            whole(**job)
        broken()

    client.submit_job = submit_job


def interrupted():
    raise KeyboardInterrupt


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def ending_by(broken, runner, todo):
    """Runs the grid until it is interrupted, or in a process of its own that is killed."""
    if broken is interrupted:
        with pytest.raises(KeyboardInterrupt):
            runner.run(todo)
        return
    process = multiprocessing.get_context("fork").Process(target=runner.run, args=(todo,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("broken", [interrupted, killed])
def test_a_cell_whose_submission_is_broken_off_is_what_it_was(cluster, tmp_path, broken):
    found, client, runner, _ = cluster("fresh", "begun", parallel=1, fresh=[0], begun=[0])
    breaking(client, broken)
    pretend(tmp_path / found[1].folder, found[1].config, 2)
    Record(1, RUNNING, job="made-begun-seed42-7").write(tmp_path, found[1].run)  # killed before
    for one in found:
        ending_by(broken, runner, [one])
    begun = RESUME if broken is killed else STOPPED
    assert states(tmp_path, found) == {"fresh": NOT_BEGUN, "begun": begun}
    assert [look(tmp_path, e, DATA, CODE).state for e in found] == [NOT_BEGUN, RESUME]
    notes = [row.note for row in rows(tmp_path)]
    told = "being submitted, unless its command was killed"
    assert notes == ([told, told] if broken is killed else ["", ""])
    found, _, runner, _ = cluster("fresh", "begun", fresh=[0], begun=[0])
    runner.run(found)
    assert outcomes(tmp_path, found) == {"fresh": (DONE, 1), "begun": (DONE, 2)}


def test_a_submission_that_is_broken_off_leaves_what_was_known_of_the_run(cluster, tmp_path):
    found, client, runner, said = cluster("a", a=[0])
    before = Record(3, FAILED, "no space", "made-a-seed42-2", {"0ld": "commit-0"})
    before.write(tmp_path, found[0].run)
    breaking(client, interrupted)
    ending_by(interrupted, runner, found)
    assert Record.read(tmp_path, found[0].run) == before
    assert any("interrupted as it was submitted" in line for line in said)


def test_a_job_that_arrived_as_its_submission_was_interrupted_is_stopped(cluster, tmp_path):
    found, client, runner, _ = cluster("a", "b", a=[], b=[])
    assert runner.start(found[0])
    breaking(client, interrupted, arrives=True)
    ending_by(interrupted, runner, found)
    assert all(job.status.is_terminal() for job in client.jobs.values())
    assert outcomes(tmp_path, found) == {"a": (STOPPED, 1), "b": (STOPPED, 1)}
    assert Record.read(tmp_path, found[1].run).job == "made-b-seed42-0"
    assert Record.read(tmp_path, found[1].run).code == {CODE.digest: CODE.commit}


def test_a_job_that_a_killed_command_had_just_submitted_is_taken_over(cluster, tmp_path):
    found, client, runner, _ = cluster("a", a=[0])
    runner.start(found[0])
    Record(0, RUNNING, code={CODE.digest: CODE.commit}).write(tmp_path, found[0].run)
    assert states(tmp_path, found) == {"a": NOT_BEGUN}
    again = GridRunner(client, tmp_path, runner.submission, print, runner.pruning)
    queue = list(found)
    again.adopt(queue)
    assert queue == []
    assert states(tmp_path, found) == {"a": RUNNING}
    again.run([])
    assert outcomes(tmp_path, found) == {"a": (DONE, 1)}
    assert client.order == ["a"]


def test_records_of_what_no_longer_runs_say_so(tmp_path):
    found = grid_of("busy", "sent", "done", "failed")
    outcome = {"busy": RUNNING, "sent": RUNNING, "done": DONE, "failed": FAILED}
    for entry in found:
        job = "" if entry.cell == "sent" else "made-0"
        Record(1, outcome[entry.cell], job=job).write(tmp_path, entry.run)
    nothing_runs(tmp_path, [entry.run for entry in found])
    assert states(tmp_path, found) == {
        "busy": STOPPED, "sent": NOT_BEGUN, "done": NOT_BEGUN, "failed": FAILED,
    }  # fmt: skip


def test_a_grid_on_a_local_ray_has_nothing_running_once_that_is_gone(
    cluster, tmp_path, monkeypatch
):
    """Whatever ended it, and even where no job could be told to stop."""
    out = tmp_path / "out"

    @contextmanager
    def local_cluster():
        yield SimpleNamespace(jobs="http://x")
        assert {row.state for row in rows(out)} == {RUNNING}  # as it goes down

    def run(runner, todo, anew):
        for entry in todo:
            Record(1, RUNNING, job="made-0").write(runner.folder, entry.run)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_command, "local_cluster", local_cluster)
    monkeypatch.setattr(grid_command, "connect", lambda address: None)
    monkeypatch.setattr(grid_command, "prepare", lambda *_: None)
    monkeypatch.setattr(grid_command, "deliver", lambda *_: None)
    monkeypatch.setattr(GridRunner, "run", run)
    path = tmp_path / "one.yaml"
    path.write_text("baseline: demo\ncells: {wide: {model.hidden_dim: 96}}\n")
    with pytest.raises(KeyboardInterrupt):
        run_grid([str(path), "--scale", "demo", "--output", str(out)])
    assert {row.state for row in rows(out)} == {STOPPED}


def test_a_job_that_never_wrote_a_line_is_asked_after(tmp_path):
    found = grid_of("a")
    Record(1, RUNNING, job="made-0").write(tmp_path, found[0].run)
    states(tmp_path, found)
    assert rows(tmp_path)[0].note == ""
    before = time.time() - 1200
    os.utime(tmp_path / "records" / f"{found[0].run}.json", (before, before))
    assert rows(tmp_path)[0].note == "no line for 20 min; was its command killed?"


def test_the_table_is_watched_while_a_cell_is_being_submitted(tmp_path, monkeypatch, capsys):
    found = grid_of("a")
    states(tmp_path, found)
    Record(0, RUNNING).write(tmp_path, found[0].run)
    looks = []

    def later(seconds):
        looks.append(seconds)
        Record(1, DONE, job="made-0").write(tmp_path, found[0].run)
        pretend(tmp_path / found[0].folder, found[0].config, 4)

    monkeypatch.setattr(grid_status.time, "sleep", later)
    status(tmp_path, watch=True)
    said = capsys.readouterr().out
    assert len(looks) == 1
    assert "being submitted, unless its command was killed" in said
    assert said.splitlines()[-1] == "1 cells: 1 done"


def test_a_cluster_that_does_not_take_a_job_leaves_the_run_as_it_was(
    cluster, tmp_path, monkeypatch
):
    found, _, runner, _ = cluster("a", patience=-1.0, a=[0])

    def refused(*_, **__):
        raise ConnectionError("refused")

    monkeypatch.setattr(grid_run, "submit", refused)
    with pytest.raises(UserError, match="did not answer for"):
        runner.run(found)
    assert Record.read(tmp_path, found[0].run) == Record()


def test_jobs_that_are_still_saving_at_a_second_interrupt_are_not_running(
    cluster, tmp_path, monkeypatch
):
    found, client, runner, _ = cluster("a", "b", a=[], b=[])
    told = []
    monkeypatch.setattr(client, "stop_job", told.append)  # they save for long
    looks = itertools.count()
    monkeypatch.setattr(grid_run.time, "sleep", lambda _: next(looks) > 3 and interrupted())
    ending_by(interrupted, runner, found)
    assert sorted(told) == ["made-a-seed42-0", "made-b-seed42-0"]
    assert outcomes(tmp_path, found) == {"a": (STOPPED, 1), "b": (STOPPED, 1)}


def test_wherever_storage_fails_the_jobs_go_on_and_each_cell_ends_well(
    cluster, tmp_path, monkeypatch
):
    """Once, at each time that something is read or written: in its place, or after it was done."""
    found, _, of_cluster, _ = cluster("a", "b", parallel=1)
    touched, fail_at = [], [0]

    def touching(whole):
        def failing(*given, **named):
            touched.append(whole)
            if len(touched) == fail_at[0]:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            done = whole(*given, **named)
            touched.append(whole)
            if len(touched) == fail_at[0]:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return done

        return failing

    def run(number):
        folder = tmp_path / str(number)
        said, client = [], ScriptedCluster(found, folder, a=[1, 0], b=[0])
        pruning = replace(of_cluster.pruning, folder=folder)
        runner = GridRunner(client, folder, of_cluster.submission, said.append, pruning)
        pretend(folder / found[1].folder, found[1].config, 3)  # to be set aside
        touched.clear()
        fail_at[0] = number
        with monkeypatch.context() as patched:
            for name in ("read", "write"):
                patched.setattr(Record, name, touching(getattr(Record, name)))
            for name in ("progress", "set_aside"):
                patched.setattr(grid_run, name, touching(getattr(grid_run, name)))
            patched.setattr(GridRunner, "keep_log", touching(GridRunner.keep_log))
            patched.setattr(GridRunner, "adopt", lambda *_: None)  # before: no job runs yet
            runner.run(found, {found[1].run})
        assert outcomes(folder, found) == {"a": (DONE, 2), "b": (DONE, 1)}, (number, said)
        assert client.order.count("a") == 2
        assert client.order.count("b") == 1
        assert sum("Stale file handle); looking again" in line for line in said) == (number > 0)
        assert (folder / "replaced" / "b-seed42-1" / "metrics.jsonl").exists()
        return len(touched)

    for number in range(1, run(0) + 1):
        run(number)


def test_storage_that_stays_away_ends_the_command_once_patience_does(
    cluster, tmp_path, monkeypatch
):
    found, _, runner, _ = cluster("a", patience=-1.0, a=[0])
    monkeypatch.setattr(runner, "adopt", lambda _: None)

    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patched:
        patched.setattr(grid_run, "progress", stale)
        with pytest.raises(OSError, match="Stale file handle"):
            runner.run(found)


class InterruptAt:
    """Raises KeyboardInterrupt before that line of jobs/grid_run.py, counted as they run."""

    def __init__(self, number: int = 0) -> None:
        self.number, self.ran = number, []

    def __enter__(self):
        sys.settrace(self.call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename == grid_run.__file__ else None

    def line(self, frame, event, arg):
        if event == "line":
            self.ran.append(frame.f_lineno)
            if len(self.ran) == self.number:
                raise KeyboardInterrupt  # with which Python ends the tracing, too
        return self.line


def alive(client) -> set[str]:
    return {
        client.entries[job.metadata["folder"]].cell
        for job in client.jobs.values()
        if not job.status.is_terminal()
    }


def test_no_cell_is_left_running_wherever_the_interrupt_falls(cluster, tmp_path):
    found, _, of_cluster, _ = cluster("a", "b", parallel=1)

    def grid(name):
        folder = tmp_path / str(name)
        client = ScriptedCluster(found, folder, a=[1, 0], b=[0])
        pruning = replace(of_cluster.pruning, folder=folder)
        return folder, client, GridRunner(client, folder, of_cluster.submission, str, pruning)

    folder, _, runner = grid("whole")
    with InterruptAt() as counted:
        runner.run(found)
    assert outcomes(folder, found) == {"a": (DONE, 2), "b": (DONE, 1)}
    assert len(counted.ran) > 300
    # Each line once: as it ran first.
    instants = {line: number for number, line in reversed(list(enumerate(counted.ran, 1)))}
    begun = set()
    for number in sorted(instants.values()):
        folder, client, runner = grid(number)
        with InterruptAt(number), pytest.raises(KeyboardInterrupt):
            runner.run(found)
        now = states(folder, found)
        assert not alive(client), number
        assert RUNNING not in now.values(), (number, now)
        assert not any(row.under_way for row in rows(folder)), number
        attempts = {cell: tried for cell, (_, tried) in outcomes(folder, found).items()}
        assert attempts == {cell: client.order.count(cell) for cell in "ab"}, number
        begun.update(now.values())
    assert begun >= {NOT_BEGUN, STOPPED, DONE, FAILED}
