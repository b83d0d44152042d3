"""A grid in MLflow: one parent, a child a run, a summary, and what was missed delivered later."""

import json
import shutil
import threading

import mlflow
import pytest

from jobs.delivery import deliver
from jobs.forwarder import About, Forwarder
from jobs.grid_state import Record
from jobs.tracking import remembered
from pipeline.tracking import read_lines
from tests.jobs.made_up_runs import cell, write_grid, write_run
from tests.ports import free_port

CELLS = {"baseline": [0.1, 0.3, 0.25], "k=1,fpn": [0.1, 0.2]}


@pytest.fixture
def grid(tmp_path, empty_store):
    """Two finished cells, one of them with two seeds, and a store that has nothing of them."""
    folder = tmp_path / "grid"
    cells = []
    for name, seed in (("baseline", 1), ("baseline", 2), ("k=1,fpn", 1)):
        run = f"runs/{name}-seed{seed}"
        curve = [ap + 0.1 * (seed - 1) for ap in CELLS[name]]
        write_run(folder / run, curve, seed=seed)
        finish_run(folder / run, len(curve))
        cells.append(cell(name, seed=seed, folder=run))
    shutil.copy(empty_store, folder / "runs/mlflow.db")
    return write_grid(folder, cells, name="tiny", baseline="baseline")


def finish_run(folder, epochs):
    line = {"kind": "event", "step": 10 * epochs, "epoch": epochs, "time": 9e3, "event": "finished"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def uri_of(grid):
    return f"sqlite:///{grid / 'runs' / 'mlflow.db'}"


def jobs_of(grid, uri):
    about = About("tiny", {"seed": 1}, {"recipe": "demo"}, grid=str(grid))
    folders = sorted(path for path in (grid / "runs").iterdir() if path.is_dir())
    return [Forwarder(folder, uri, about, say=lambda _: None) for folder in folders]


def runs_of(uri):
    """The parent, and its children by name."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    found = client.search_runs([experiment])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    children = [run for run in found if run is not parent]
    ids = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert ids <= {parent.info.run_id}
    names = [run.info.run_name for run in children]
    assert len(names) == len(set(names))
    return parent, {run.info.run_name: run for run in children}


def test_jobs_that_begin_at_once_make_one_parent(grid):
    (grid / "runs/mlflow.db").unlink()  # they make the store, too
    threads = [threading.Thread(target=job.finish, args=("FINISHED",)) for job in
               jobs_of(grid, uri_of(grid))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(3):  # where one has met a database that another had locked
        deliver(grid, "", print)
    parent, children = runs_of(uri_of(grid))
    assert parent.info.run_name == "tiny"
    assert parent.data.tags["grid_folder"] == str(grid)
    assert set(children) == {"baseline-seed1", "baseline-seed2", "k=1,fpn-seed1"}


def test_the_parent_has_a_summary_once(grid):
    for job in jobs_of(grid, uri_of(grid)):
        assert job.finish("FINISHED"), job.why
    assert runs_of(uri_of(grid))[0].info.status == "RUNNING"
    said = []
    deliver(grid, "", said.append)
    parent, _ = runs_of(uri_of(grid))
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == pytest.approx(
        {"runs": 3, "runs_done": 3, "best_AP/baseline": 0.35, "best_AP/k_1_fpn": 0.2}
    )
    assert parent.data.tags["cells"] == "baseline, k=1,fpn"
    assert parent.data.tags["seeds"] == "1, 2"
    assert "| k=1,fpn | 1 | done | 2/2 | 0.200 |" in parent.data.tags["mlflow.note.content"]
    # The same command again, after a comparison.
    (grid / "compare.md").write_text("# tiny")
    for _ in range(2):
        deliver(grid, "", said.append)
    client = mlflow.MlflowClient(tracking_uri=uri_of(grid))
    paths = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert paths == {"grid.json", "compare.md"}
    again, _ = runs_of(uri_of(grid))
    assert again.info.run_id == parent.info.run_id
    assert len(client.get_metric_history(parent.info.run_id, "best_AP/baseline")) == 1
    assert said == []


def test_an_evaluation_of_another_run_is_a_child_too(grid):
    # Its job is no training's (jobs.grid_augmented) and does not speak of MLflow.
    first, second, third = jobs_of(grid, uri_of(grid))
    (third.folder / "mlflow.json").unlink()
    assert first.finish("FINISHED")
    assert second.finish("FINISHED")
    deliver(grid, "", print)
    _, children = runs_of(uri_of(grid))
    child = children["k=1,fpn-seed1"]
    assert child.info.status == "FINISHED"
    assert child.data.metrics["val/AP"] == 0.2
    assert child.data.params["optimizer.lr"] == "0.0002"
    assert child.data.tags["val_digest"] == "val"


def test_nothing_new_needs_no_mlflow(grid, monkeypatch):
    for job in jobs_of(grid, uri_of(grid)):
        assert job.finish("FINISHED"), job.why
    deliver(grid, "", print)
    monkeypatch.setattr("jobs.parent_run.connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr("jobs.forwarder.connect", lambda *_: pytest.fail("connected"))
    deliver(grid, "", print)


def test_a_failed_and_a_killed_cell(grid):
    jobs = jobs_of(grid, uri_of(grid))
    for job in jobs:
        assert job.try_to_send()  # their drivers are killed, all three
    for name in ("baseline-seed2", "k=1,fpn-seed1"):
        log = grid / "runs" / name / "metrics.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    Record(attempts=2, outcome="failed", error="boom").write(grid, "k=1,fpn-seed1")
    deliver(grid, "", print)
    parent, children = runs_of(uri_of(grid))
    assert parent.info.status == "FAILED"
    assert {name: run.info.status for name, run in children.items()} == {
        "baseline-seed1": "FINISHED", "baseline-seed2": "KILLED", "k=1,fpn-seed1": "FAILED",
    }  # fmt: skip


def test_a_job_that_died_while_it_made_the_parent_leaves_one(grid):
    first, second, _ = jobs_of(grid, uri_of(grid))
    assert first.try_to_send()
    state = remembered(grid)
    (grid / "mlflow.json").write_text(json.dumps({**state, "run_id": ""}))
    assert second.try_to_send()
    assert remembered(grid)["run_id"] == state["run_id"]
    assert len(runs_of(uri_of(grid))[1]) == 2


def test_a_grid_that_never_spoke_of_mlflow_says_nothing(grid):
    said = []
    deliver(grid, "", said.append)
    assert said == []
    assert not (grid / "mlflow.json").exists()


def test_a_password_that_is_not_known_here(grid, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:pa55word@127.0.0.1:{free_port()}"
    for job in jobs_of(grid, uri):
        assert not job.finish("FINISHED")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    deliver(grid, "", said.append)
    assert len(said) == 1
    assert "set MLFLOW_TRACKING_URI to that address with its password" in said[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    deliver(grid, "", said.append)
    assert "Connection refused" in said[1]
    assert "the same command sends it" in said[1]
    assert "pa55word" not in str(said)


def test_a_store_that_was_away_all_the_time_has_everything_afterwards(grid, empty_store, tmp_path):
    # tests/jobs/test_tracked_grid.py does so with a server.
    store = tmp_path / "store"
    store.touch()  # not the folder that it should be
    uri = f"sqlite:///{store}/mlflow.db"
    for job in jobs_of(grid, uri):
        assert not job.finish("FINISHED")
    said = []
    deliver(grid, "", said.append)
    assert len(said) == 1
    assert "File exists" in said[0]
    store.unlink()
    store.mkdir()
    shutil.copy(empty_store, store / "mlflow.db")
    for _ in range(2):
        deliver(grid, "", said.append)
    assert len(said) == 1
    parent, children = runs_of(uri)
    assert parent.info.status == "FINISHED"
    assert len(children) == 3
    client = mlflow.MlflowClient(tracking_uri=uri)
    for name, run in children.items():
        assert run.info.status == "FINISHED"
        had = client.get_metric_history(run.info.run_id, "val/AP")
        lines = read_lines(grid / "runs" / name / "metrics.jsonl")
        expected = [(x["step"], x["AP"]) for x in lines if x["kind"] == "evaluation"]
        assert [(m.step, m.value) for m in had] == expected
