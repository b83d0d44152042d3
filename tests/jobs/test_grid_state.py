"""What a grid's command finds, runs, retries and tells, on made-up run folders and a cluster
that is a script."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import grid_run, grid_state
from jobs.grid import Cell, Grid, entries
from jobs.grid_command import run_grid, sole, write_grid
from jobs.grid_plan import Measured, Planned, finish, report
from jobs.grid_state import (
    CHANGED,
    DONE,
    FAILED,
    NOT_BEGUN,
    RESUME,
    STOPPED,
    Code,
    Record,
    RunProgress,
    look,
    progress,
    set_aside,
)
from jobs.grid_status import duration, rows, status
from pipeline.errors import UserError
from pipeline.recipes import recipe
from tests.jobs import made_up_grids
from tests.jobs.made_up_grids import CODE, DATA, EPOCHS, grid_of, outcomes, pretend, scripted


def test_a_run_is_not_begun_then_half_done_then_done(tmp_path):
    (entry,) = grid_of("a")
    folder = tmp_path / entry.folder
    assert look(tmp_path, entry, DATA, CODE).state == NOT_BEGUN
    pretend(folder, entry.config, 2)
    found = look(tmp_path, entry, DATA, CODE)
    assert (found.state, found.why) == (RESUME, "")
    assert (found.progress.epoch, found.progress.epochs, found.progress.ap) == (2.0, EPOCHS, 0.2)
    assert found.progress.left == 40.0  # 20 steps at 2 s
    pretend(folder, entry.config, EPOCHS)
    assert look(tmp_path, entry, DATA, CODE).state == DONE
    assert look(tmp_path, entry, {}, CODE).state == DONE  # shards that this machine does not see


@pytest.mark.parametrize("epochs", [2, EPOCHS])
def test_another_config_or_other_data_is_a_change(epochs, tmp_path):
    (entry,) = grid_of("a")
    pretend(tmp_path / entry.folder, entry.config, epochs)
    config = entry.config
    other = replace(entry, config=replace(config, optimizer=replace(config.optimizer, lr=0.5)))
    found = look(tmp_path, other, DATA, CODE)
    assert (found.state, found.why) == (CHANGED, "optimizer.lr 0.002 -> 0.5")
    found = look(tmp_path, entry, {**DATA, "val": "v1"}, CODE)
    assert (found.state, found.why) == (CHANGED, "data.val has other content")
    # Neither where data lies nor how work is spread is of the identity.
    moved = replace(
        config,
        data=replace(config.data, train="/elsewhere"),
        engine=replace(config.engine, log_every=7),
    )
    assert look(tmp_path, replace(entry, config=moved), DATA, CODE).state in (RESUME, DONE)


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"config": 3}', "future", "no digest"])
def test_a_run_whose_config_cannot_be_read_is_changed(damage, tmp_path):
    (entry,) = grid_of("a")
    pretend(tmp_path / entry.folder, entry.config, EPOCHS)
    path = tmp_path / entry.folder / "config.json"
    before = json.loads(path.read_text())
    if damage == "future":
        before["config"]["model"]["of_the_future"] = 1
    if damage == "no digest":
        del before["train_digest"]
    made = damage in ("future", "no digest")
    path.write_text(json.dumps(before) if made else damage)
    found = look(tmp_path, entry, DATA, CODE)
    assert found.state == CHANGED
    assert "damaged or of another version" in found.why


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "records").mkdir()
    for text in ("{", '{"attempt": 1}', "[]"):
        (tmp_path / "records" / "a-seed42.json").write_text(text)
        with pytest.raises(UserError, match=r"a-seed42\.json cannot be read"):
            Record.read(tmp_path, "a-seed42")


@pytest.mark.parametrize("reading", ["read_text", "read_bytes"])
def test_a_run_that_is_set_aside_while_it_is_looked_at_has_not_begun(
    tmp_path, monkeypatch, reading
):
    """As `jobs status --watch` may meet it: at its record, or at its metrics."""
    (entry,) = grid_of("a")
    pretend(tmp_path / entry.folder, entry.config, 2)
    Record(1, STOPPED).write(tmp_path, entry.run)
    read = getattr(Path, reading)

    def too_late(path):
        monkeypatch.undo()
        set_aside(tmp_path, entry)
        return read(path)

    monkeypatch.setattr(Path, reading, lambda path, **_: too_late(path))
    if reading == "read_text":
        assert Record.read(tmp_path, entry.run) == Record()
    assert progress(tmp_path / entry.folder) == RunProgress()


def test_other_code_is_told_and_trained_anew_only_when_asked(tmp_path):
    (entry,) = grid_of("a")
    pretend(tmp_path / entry.folder, entry.config, EPOCHS)
    Record(1, DONE, code={"c0de": "commit-1"}).write(tmp_path, entry.run)
    assert look(tmp_path, entry, DATA, CODE).why == ""
    new = Code("c1de", "commit-2")
    found = look(tmp_path, entry, DATA, new)
    assert (found.state, found.why) == (
        DONE, "code of commit-1; --rerun-changed-code trains it anew"
    )  # fmt: skip
    found = look(tmp_path, entry, DATA, new, rerun_changed_code=True)
    assert (found.state, found.why) == (CHANGED, "code: trained by commit-1")


def test_a_failed_run_says_why_and_is_done_once_it_is(tmp_path):
    (entry,) = grid_of("a")
    Record(2, FAILED, "no space").write(tmp_path, entry.run)
    found = look(tmp_path, entry, DATA, CODE)
    assert (found.state, found.why, found.record.attempts) == (FAILED, "no space", 2)
    pretend(tmp_path / entry.folder, entry.config, 1)
    assert look(tmp_path, entry, DATA, CODE).state == FAILED
    pretend(tmp_path / entry.folder, entry.config, EPOCHS)
    assert look(tmp_path, entry, DATA, CODE).state == DONE


def test_the_codes_digest_is_of_what_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(grid_state, "ROOT", tmp_path)
    for package in ("cuda_ops", "model", "pipeline", "jobs"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    first = Code.present().digest
    (tmp_path / "jobs" / "a.py").write_text("x = 2\n")
    (tmp_path / "model" / "a.pyc").write_text("x")
    assert Code.present().digest == first
    (tmp_path / "model" / "a.py").write_text("x = 2\n")
    second = Code.present().digest
    (tmp_path / "model" / "a.py").rename(tmp_path / "model" / "b.py")
    assert len({first, second, Code.present().digest}) == 3


def test_torn_and_empty_metrics_are_read(tmp_path):
    assert not progress(tmp_path).finished
    (tmp_path / "metrics.jsonl").write_text("")
    assert progress(tmp_path).epochs == 0
    (entry,) = grid_of("a")
    pretend(tmp_path, entry.config, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2')
    assert progress(tmp_path).epoch == 1.0


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return scripted(tmp_path, monkeypatch)


def test_failures_are_retried_reported_and_hold_nobody_up(cluster, tmp_path):
    found, client, runner, said = cluster(
        "good", "flaky", "broken", "mistaken", places=2,
        good=[0], flaky=[1, 0], broken=[1, 1], mistaken=[2],
    )  # fmt: skip
    runner.run(found)
    assert outcomes(tmp_path, found) == {
        "good": (DONE, 1), "flaky": (DONE, 2), "broken": (FAILED, 2), "mistaken": (FAILED, 1),
    }  # fmt: skip
    assert client.most == 2
    assert client.order[:4] == ["good", "flaky", "broken", "mistaken"]
    error = Record.read(tmp_path, "broken-seed42").error
    assert error == "made-broken-seed42-1 broke"
    assert "last words" in (tmp_path / "logs" / "made-broken-seed42-1.log").read_text()
    assert sum("will be tried again" in line for line in said) == 2
    assert any("flaky-seed42: epoch 4/4, best AP so far 0.400" in line for line in said)


def test_parallel_limits_and_a_full_cluster_still_gets_one(cluster, tmp_path):
    found, client, runner, _ = cluster("a", "b", "c", parallel=1, a=[0], b=[0], c=[0])
    runner.run(found)
    assert client.most == 1
    found, client, runner, _ = cluster("d", "e", places=0, d=[0], e=[0])
    runner.run(found)
    assert client.most == 1
    assert outcomes(tmp_path, found) == {"d": (DONE, 1), "e": (DONE, 1)}


def test_an_interrupt_saves_what_runs_and_leaves_the_rest(cluster, tmp_path, monkeypatch):
    found, client, runner, said = cluster("a", "b", "c", places=2, a=[0], b=[], c=[0])

    def interrupted(seconds: float) -> None:
        if outcomes(tmp_path, found)["a"][0] == DONE and client.order[-1] == "c":
            monkeypatch.setattr(grid_run.time, "sleep", lambda _: None)
            raise KeyboardInterrupt

    monkeypatch.setattr(grid_run.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(found)
    assert outcomes(tmp_path, found) == {"a": (DONE, 1), "b": ("stopped", 1), "c": ("stopped", 1)}
    assert any("saving 2 runs" in line for line in said)
    assert all(job.status.is_terminal() for job in client.jobs.values())
    states = {e.cell: look(tmp_path, e, DATA, Code.present()).state for e in found}
    assert states == {"a": DONE, "b": RESUME, "c": RESUME}


def test_jobs_that_an_earlier_command_left_are_taken_over(cluster, tmp_path):
    found, client, runner, said = cluster("a", "b", a=[0], b=[0])
    client.submit_job("old-3", {"folder": str(tmp_path / found[0].folder)})
    runner.run(found)
    assert client.order == ["a", "b"]
    assert any("a-seed42: job old-3 trains it already" in line for line in said)
    assert outcomes(tmp_path, found)["a"][0] == DONE
    # But not where it trains what is no longer asked for.
    found, client, runner, _ = cluster("a", "b", a=[0], b=[0])
    client.submit_job("old-4", {"folder": str(tmp_path / found[0].folder)})
    with pytest.raises(UserError, match=r"job old-4 trains .* as it was before; stop it first"):
        runner.run(found, {found[0].run})


def test_a_changed_run_is_set_aside_whole(cluster, tmp_path):
    found, _, runner, _ = cluster("a", a=[0])
    pretend(tmp_path / found[0].folder, found[0].config, 3)
    Record(5, DONE).write(tmp_path, found[0].run)
    before = (tmp_path / found[0].folder / "metrics.jsonl").read_text()
    runner.run(found, {found[0].run})
    assert (tmp_path / "replaced" / "a-seed42-1" / "metrics.jsonl").read_text() == before
    assert outcomes(tmp_path, found) == {"a": (DONE, 1)}


def test_a_cluster_that_is_away_for_a_while_is_waited_for(cluster, tmp_path, monkeypatch):
    found, client, runner, said = cluster("a", a=[0])
    runner.adopt([])
    client.failing_looks = 3
    monkeypatch.setattr(runner, "adopt", lambda queue: None)
    runner.run(found)
    assert sum("does not answer" in line for line in said) == 1
    assert outcomes(tmp_path, found) == {"a": (DONE, 1)}
    found, client, runner, _ = cluster("b", patience=-1.0, b=[0])
    monkeypatch.setattr(runner, "adopt", lambda queue: None)
    client.failing_looks = 99
    with pytest.raises(UserError, match=r"did not answer for .* the same command goes on"):
        runner.run(found)


def test_an_augmented_evaluation_waits_for_its_run_and_fails_without_it(cluster, tmp_path):
    for status_, expected in ((0, (DONE, 1)), (2, (FAILED, 0))):
        found, client, runner, _ = cluster("a", "b", a=[status_], b=[0])
        twice = replace(found[1], config=found[0].config, evaluates=found[0].folder)
        client.entries[str(tmp_path / twice.folder)] = twice
        runner.run([twice, found[0]])
        assert outcomes(tmp_path, [twice])["b"] == expected
        jobs = list(client.jobs.values())
        assert client.order == ["a", "b"][: len(jobs)]
        trained = tmp_path / found[0].folder
        if status_ == 0:
            assert jobs[1].entrypoint == f"python -m jobs.grid_augmented {trained}"
        else:
            error = Record.read(tmp_path, twice.run).error
            assert error == "a-seed42, which it evaluates, is not done"
        for entry in found:
            shutil.rmtree(tmp_path / entry.folder, ignore_errors=True)
            (tmp_path / "records" / f"{entry.run}.json").unlink()


def test_success_without_a_run_is_a_failure(cluster, tmp_path, monkeypatch):
    found, _, runner, _ = cluster("a", retries=0, a=[0])
    monkeypatch.setattr(made_up_grids, "pretend", lambda *_: None)
    runner.run(found)
    assert "same storage" in Record.read(tmp_path, "a-seed42").error


def test_one_command_at_a_time(tmp_path):
    with sole(tmp_path), pytest.raises(UserError, match="is being run by another command"):
        sole(tmp_path)
    with sole(tmp_path):
        pass


def test_status_shows_each_cell_without_a_cluster(tmp_path, capsys):
    found = grid_of("fine", "under_way", "broken", "silent", "waiting")
    write_grid(tmp_path, "made", "fine", [*found, replace(found[0], cell="twin")], ["made"])
    for entry, epochs, outcome in zip(found, (4, 2, 1, 2), (DONE, "running", FAILED, "running"),
                                      strict=False):  # fmt: skip
        pretend(tmp_path / entry.folder, entry.config, epochs)
        error = "it broke" if outcome == FAILED else ""
        Record(2, outcome, error, job="made-0").write(tmp_path, entry.run)
    for entry in found[1], found[3]:
        os.utime(tmp_path / "records" / f"{entry.run}.json", (2000.0, 2000.0))
    log = tmp_path / found[1].folder / "metrics.jsonl"
    shift = time.time() - 1040.0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps({**x, "time": x["time"] + shift}) + "\n" for x in lines))
    status(tmp_path, watch=False)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[1] == ["fine", "42", "done", "4.0/4", "0.400", "-", "2"]
    assert said[2] == ["under_way", "42", "running", "2.0/4", "0.200", "40", "s", "2"]
    assert said[3] == ["broken", "42", "failed", "1.0/4", "0.100", "-", "2", "it", "broke"]
    assert said[4][:3] == ["silent", "42", "running"]
    assert said[4][-4:] == ["was", "its", "command", "killed?"]
    assert said[5] == ["waiting", "42", "not", "begun", "-", "-", "-", "0"]
    assert said[6][-4:] == ["the", "run", "of", "fine-seed42"]
    assert " ".join(said[7]) == "6 cells: 2 done, 2 running, 1 failed, 1 not begun"
    with pytest.raises(UserError, match=r"is no grid's folder: it has no grid\.json"):
        rows(tmp_path / "runs")
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        rows(tmp_path)


def test_grid_json_says_what_compare_reads(tmp_path):
    cells = (Cell("a", "demo", {}, "table2/fpn"), Cell("b", "demo", {"model.num_points": 1}))
    found = entries(Grid("made", cells, "a"), False, 2, lambda config: config)
    write_grid(tmp_path, "made", "a", found, ["made"])
    content = json.loads((tmp_path / "grid.json").read_text())
    assert (content["name"], content["baseline"]) == ("made", "a")
    assert content["cells"][0] == {
        "name": "a", "folder": "runs/a-seed42", "seed": 42, "published": "table2/fpn",
        "differences": {},
    }  # fmt: skip
    assert content["cells"][3] == {
        "name": "b", "folder": "runs/b-seed43", "seed": 43, "published": None,
        "differences": {"model.num_points": [4, 1]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hours", "parallel", "expected"),
    [([3, 1, 1], 1, 5), ([3, 1, 1], 2, 3), ([1, 1, 3], 2, 4), ([2], 8, 2), ([], 2, 0)],
)
def test_a_plans_finish_is_that_of_the_queue(hours, parallel, expected):
    assert finish(hours, parallel) == expected


def test_a_plan_sums_hours_workers_and_cost():
    found = grid_of("a", "b", "c")
    measured = Measured(step=0.5, slowest=1.0, evaluation=900.0, steps=7200, gpu=True)
    planned = [
        Planned(found[0], 1.0, measured),  # 7200 * 0.5 s + 4 * 900 s = 2 h
        Planned(found[1], 0.5, measured),
        Planned(found[2], 1.0, Measured(failed="out of memory")),
    ]
    lines = report(planned, workers=8, parallel=2, price=2.5)
    assert " ".join(lines[1].split()) == "a-seed42 7200 0.500 1.000 900.0 2.00 16.00 40.00"
    assert " ".join(lines[2].split()) == "b-seed42 3600 0.500 1.000 900.0 1.00 8.00 20.00"
    assert lines[3].endswith("out of memory")
    assert lines[4].startswith("in the mean: 24.00 GPU-hours, cost 60.00, finished after 2.00 h")
    assert lines[5].startswith("at most: 36.00 GPU-hours, cost 90.00, finished after 3.00 h")
    assert lines[6] == "not measured, and in no sum: 1 runs"


def test_durations_are_read_at_a_glance():
    assert [duration(x) for x in (5, 99, 1000, 9000)] == ["5 s", "99 s", "17 min", "2.5 h"]


@pytest.mark.timeout(280)
def test_a_plan_takes_real_steps_of_what_is_not_done(drawn, tmp_path, capfd):
    path = tmp_path / "two.yaml"
    path.write_text(
        "baseline: demo\nset: {optimizer.batch_size: 8, schedule.epochs: 4}\n"
        "cells: {fine: {init.weights: /none}, wide: {model.hidden_dim: 96}}\n"
    )
    out = tmp_path / "out"
    (entry,) = entries(
        Grid("one", (Cell("x", "demo", {"optimizer.batch_size": 8, "schedule.epochs": 4}),)),
        False, 1, lambda config: config,
    )  # fmt: skip
    pretend(out / "runs" / "baseline-seed42", entry.config, 4)
    (out / "grid.json").write_text(json.dumps({"name": "two", "cells": []}))
    shards = ["--data.train", str(drawn.shards / "train"), "--data.val", str(drawn.shards / "val")]
    run_grid([str(path), "--output", str(out), *shards, "--plan", "--plan-steps", "2"])
    lines = capfd.readouterr().out.splitlines()
    assert "baseline-seed42" not in "\n".join(lines)
    assert any(x.startswith("fine-seed42") and "'/none'" in x for x in lines)
    (wide,) = [x.split() for x in lines if x.startswith("wide-seed42")]
    assert wide[1] == "20"  # 40 images, 4 epochs of 5 steps
    step, slowest, evaluation = map(float, wide[2:5])
    assert 0 < step <= slowest < 60
    assert 0 < evaluation < 60
    assert set(os.listdir(out)) == {"runs", "grid.json"}


def test_recipes_are_the_demos_in_these_tests():
    assert recipe("demo").schedule.epochs == 6  # what at_demo_scale's proportion is made of
