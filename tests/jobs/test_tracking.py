"""Metrics reach MLflow once each, through restarts, rewinds and a server that is away."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from unittest.mock import Mock

import mlflow
import pytest

from jobs.forwarder import About, Forwarder, Source
from jobs.summary import summary
from jobs.system_metrics import SYSTEM_FILE
from jobs.tracking import (
    check_model_name,
    check_tracking_uri,
    choose_tracking_uri,
    default_tracking_uri,
    flat,
    metric_name,
    reason,
    shown,
)
from pipeline.errors import UserError
from pipeline.follow import Tail
from pipeline.progress import ProgressPrinter
from pipeline.recipes import recipe
from pipeline.tracking import MetricsLog
from tests.jobs.mlflow_server import start_server, stop_server
from tests.ports import free_port

BEST = {
    "checkpoint": "step-00000001",
    "epoch": 1,
    "summary": dict.fromkeys(
        ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L",
         "AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"), 0.5
    ),
    "per_class": {"circle": 0.5},
}  # fmt: skip


def history(uri, run_id, key):
    client = mlflow.MlflowClient(tracking_uri=uri)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


SOURCES = (
    Source("train", "shards/train", "7" * 64, "/shared/shards/train", 40, 136),
    Source("validation", "shards/val", "8" * 64, "https://***@host/shards/val", 12, 55),
)


@pytest.fixture
def folder(tmp_path, empty_store):
    """A run's, with its default store beside it, which is empty."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "runs")
    return folder


def about(config=None, **more):
    params = flat(dataclasses.asdict(config or recipe("demo")))
    return About("tests", params, {"recipe": "demo"}, SOURCES, **more)


def forwarder(folder, uri, **more):
    return Forwarder(folder, uri, about(), **more)


def write_system(folder, steps):
    with (folder / SYSTEM_FILE).open("a") as file:
        for step in steps:
            line = {"kind": "system", "step": step, "time": 1.7e9 + step}
            values = {"cpu_utilization_percentage": 50.0, "disk_usage_percentage": 10.0 + step}
            file.write(json.dumps({**line, **values}) + "\n")


def test_a_tail_gives_whole_lines_and_starts_anew_after_a_rewind(tmp_path):
    log = MetricsLog(tmp_path)
    tail = Tail(log.path)
    assert tail.new_lines() == []
    log.write("train", 1, 0.1, loss=3.0)
    with log.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [x["step"] for x in tail.new_lines()] == [1]
    with log.path.open("a") as file:
        file.write('ep": 2}\n')
    assert [x["step"] for x in tail.new_lines()] == [2]
    log.write("train", 3, 0.3, loss=1.0)
    log.rewind(1, 0)
    log.write("train", 2, 0.2, loss=2.0)
    assert [x["step"] for x in tail.new_lines()] == [1, 2]


def test_a_tail_sees_a_rewind_that_falls_into_its_look(tmp_path, monkeypatch):
    """The file that it has opened is the old one by then: of the new one nothing is read yet."""
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, step / 10, loss=1.0)
    tail, whole = Tail(log.path), Path.open

    def late(path, *given, **named):
        opened = whole(path, *given, **named)
        if given == ("rb",):
            monkeypatch.setattr(Path, "open", whole)
            log.rewind(1, 0)
            log.write("train", 2, 0.2, loss=2.0)
        return opened

    monkeypatch.setattr(Path, "open", late)
    assert [x["loss"] for x in tail.new_lines()] == [1.0, 1.0, 1.0]
    assert [x["loss"] for x in tail.new_lines()] == [1.0, 2.0]


def test_progress_has_loss_speed_and_time_left(tmp_path, capsys):
    log = MetricsLog(tmp_path)
    log.write("train", 40, 1.6, loss=99.0, images_per_second=88.4)  # before: of an earlier start
    printer = ProgressPrinter(tmp_path, "demo")
    log.write("event", 0, 0.0, event="start", steps=100, epochs=4, world=2)
    log.write("event", 0, 0.0, event="message", text="hello")
    log.write("train", 50, 2.0, loss=4.321, images_per_second=88.4)
    log.write("evaluation", 50, 2.0, AP=0.5, AP50=0.7, AP75=0.4, AP_S=0.1, AP_M=0.2, AP_L=-1.0)
    printer.print_new()
    out = capsys.readouterr().out
    assert "99.0" not in out
    log.rewind(50, 2)  # a restart writes the file anew
    printer.print_new()
    assert capsys.readouterr().out == ""
    for word in ("hello", "epoch 2/4", "50%|", "50/100", "4.32", "88 images/s", "left", "AP 0.500"):
        assert word in out


def test_progress_goes_on_after_the_storage_was_away(tmp_path, capsys, monkeypatch):
    """An error of the printer would take the place of what the job has to say at its end."""
    printer = ProgressPrinter(tmp_path, "demo")
    MetricsLog(tmp_path).write("event", 0, 0.0, event="message", text="hello")
    with monkeypatch.context() as away:
        stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        away.setattr(Path, "open", Mock(side_effect=stale))
        printer.start()
        printer.finish()
    assert capsys.readouterr().out == ""
    printer.print_new()
    assert capsys.readouterr().out == "hello\n"


def test_every_metric_arrives_once_through_restart_and_rewind(folder):
    uri = default_tracking_uri(folder)
    log = MetricsLog(folder)
    first = forwarder(folder, uri)
    for step in range(1, 6):
        log.write("train", step, step / 10, loss=10.0 / step)
    log.write("evaluation", 5, 0.5, AP=0.25, **{"AP/traffic light (new)": 0.5})
    log.write("event", 5, 0.5, event="message", text="hello")
    assert first.try_to_send()
    log.rewind(3, 0)  # resumed from step 3: steps 4 and 5 come again
    second = forwarder(folder, uri)
    for step in range(4, 8):
        log.write("train", step, step / 10, loss=10.0 / step)
    log.write("evaluation", 5, 0.5, AP=0.25)
    (folder / "config.json").write_text("{}")
    second.start()
    assert second.finish("FINISHED")
    run_id = second.state["run_id"]
    assert run_id == first.state["run_id"]
    assert history(uri, run_id, "train/loss") == [(s, 10.0 / s) for s in range(1, 8)]
    assert history(uri, run_id, "val/AP") == [(5, 0.25)]
    assert history(uri, run_id, metric_name("evaluation", "AP/traffic light (new)")) == [(5, 0.5)]
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.num_queries"] == "30"
    assert run.data.params["optimizer.lr"] == "0.002"
    assert run.data.tags["recipe"] == "demo"
    assert {a.path for a in client.list_artifacts(run_id)} == {"config.json", "metrics.jsonl"}
    # MLflow's only axis is the step: the epoch is a metric beside the others.
    assert history(uri, run_id, "train/epoch") == [(s, s / 10) for s in range(1, 8)]
    assert history(uri, run_id, "val/epoch") == [(5, 0.5)]
    sources = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert {k: (x.name, x.digest) for k, x in sources.items()} == {
        "train": ("shards/train", "7" * 36), "validation": ("shards/val", "8" * 36),
    }  # fmt: skip
    assert json.loads(sources["train"].source) == {"uri": "/shared/shards/train"}
    assert json.loads(sources["validation"].source) == {"url": "https://***@host/shards/val"}
    assert json.loads(sources["train"].profile)["manifest_digest"] == "7" * 64


def test_an_attempt_that_died_before_it_remembered_doubles_nothing(folder):
    uri, log = default_tracking_uri(folder), MetricsLog(folder)
    for step in (1, 2, 3):
        log.write("train", step, step / 10, loss=1.0 / step)
    log.write("evaluation", 3, 0.3, AP=0.5)
    first = forwarder(folder, uri)
    first.open()
    remembered = (folder / "mlflow.json").read_text()
    write_system(folder, range(3))
    assert first.try_to_send()
    (folder / "mlflow.json").write_text(remembered)  # killed after sending
    log.rewind(1, 0)
    for step in (2, 3, 4):  # the same numbers, at other times
        log.write("train", step, step / 10, loss=1.0 / step)
    log.write("evaluation", 3, 0.3, AP=0.5)
    write_system(folder, range(3, 5))
    second = forwarder(folder, uri)
    assert second.try_to_send()
    assert history(uri, second.state["run_id"], "train/loss") == [
        (step, 1.0 / step) for step in (1, 2, 3, 4)
    ]
    run_id = second.state["run_id"]
    assert history(uri, run_id, "val/AP") == [(3, 0.5)]
    assert history(uri, run_id, "system/disk_usage_percentage") == [(x, 10.0 + x) for x in range(5)]


@pytest.mark.parametrize("damage", [b"", b'{"sent"', b"[]", b"\xff"])
def test_a_damaged_memory_ends_no_job_and_all_is_sent_anew(folder, capsys, damage):
    uri = default_tracking_uri(folder)
    MetricsLog(folder).write("train", 1, 0.1, loss=1.0)
    first = forwarder(folder, uri)
    assert first.try_to_send()
    (folder / "mlflow.json").write_bytes(damage)
    MetricsLog(folder).write("train", 2, 0.2, loss=0.5)
    second = forwarder(folder, uri)
    assert second.try_to_send()
    assert history(uri, second.state["run_id"], "train/loss") == [(1, 1.0), (2, 0.5)]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{folder}/mlflow.json is damaged: it is no")
    assert said.endswith("; all of it is sent anew, to another MLflow run")


def test_an_attempt_that_died_while_it_made_the_run_leaves_one(folder):
    uri = default_tracking_uri(folder)
    first = forwarder(folder, uri)
    first.open()
    state = {**first.state, "run_id": ""}  # killed before its id was written down
    (folder / "mlflow.json").write_text(json.dumps(state))
    second = forwarder(folder, uri)
    assert second.try_to_send()
    assert second.state["run_id"] == first.state["run_id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    # An option of execution has changed since: MLflow keeps what it was told first.
    config = recipe("demo")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, log_every=7))
    third = Forwarder(folder, uri, about(config))
    assert third.try_to_send()


def test_two_jobs_begun_at_once_in_a_folder_tell_one_run(folder, monkeypatch):
    """One of them will be refused, but by then both have spoken to MLflow."""
    uri = default_tracking_uri(folder)
    barrier, create = Barrier(2, timeout=1.0), mlflow.MlflowClient.create_run

    def together(*arguments, **options):
        with contextlib.suppress(BrokenBarrierError):  # the other waits for this one
            barrier.wait()
        return create(*arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", together)
    both = [forwarder(folder, uri) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Forwarder.try_to_send, both))  # MLflow may take one's data sets later
    assert all(one.try_to_send() for one in both)
    assert both[0].state["run_id"] == both[1].state["run_id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_classes_of_any_name_are_taken_by_mlflow(folder):
    uri, log = default_tracking_uri(folder), MetricsLog(folder)
    names = ("Hat/Helmet", "a//b", "../up", "/top", "end/", "..", "{}$", "naïve 猫", "x" * 400)
    classes = {f"AP/{name}": float(i) for i, name in enumerate(names)}
    log.write("evaluation", 5, 0.5, AP=0.25, **classes)
    sender = forwarder(folder, uri)
    assert sender.try_to_send(), sender.why
    data = mlflow.MlflowClient(tracking_uri=uri).get_run(sender.state["run_id"]).data
    had = {value for key, value in data.metrics.items() if key.startswith("val/AP/")}
    assert had == set(map(float, range(len(names))))


def test_another_store_is_told_everything_and_the_same_one_nothing_twice(folder, tmp_path):
    MetricsLog(folder).write("train", 1, 0.1, loss=1.0)
    one = default_tracking_uri(folder)
    two = f"sqlite:///{tmp_path}/two.db"  # not there yet: it is made
    (tmp_path / "alias.db").symlink_to(tmp_path / "two.db")  # as a server with two addresses
    runs = {}
    for uri in (one, two, one, f"sqlite:///{tmp_path}/alias.db"):
        sender = forwarder(folder, uri)
        assert sender.finish("FINISHED"), sender.why
        assert history(uri, sender.state["run_id"], "train/loss") == [(1, 1.0)]
        runs[uri] = sender.state["run_id"]
    assert runs[f"sqlite:///{tmp_path}/alias.db"] == runs[two]
    for uri in (one, two):
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("tests")
        assert len(client.search_runs([experiment.experiment_id])) == 1


def test_more_metrics_than_one_batch_takes(folder, monkeypatch):
    monkeypatch.setattr("jobs.forwarder.MOST_METRICS", 5)
    uri, log = default_tracking_uri(folder), MetricsLog(folder)
    for step in range(1, 8):
        log.write("train", step, step / 10, loss=1.0 / step, lr=0.1)
    sender = forwarder(folder, uri)
    assert sender.try_to_send()
    for key in ("train/loss", "train/lr"):
        assert [s for s, _ in history(uri, sender.state["run_id"], key)] == list(range(1, 8))


def test_where_metrics_go(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert choose_tracking_uri("", tmp_path / "run") == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-the-node")
    assert choose_tracking_uri("", tmp_path / "run") == "http://from-the-node"
    assert choose_tracking_uri("http://asked", tmp_path / "run") == "http://asked"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://me:s3cr3t@host:8000/path", "https://***@host:8000/path"),
        ("postgresql://me:s3c@r3t@db/mlflow", "postgresql://***@db/mlflow"),
        ("https://token@host", "https://***@host"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////runs/a@b/mlflow.db", "sqlite:////runs/a@b/mlflow.db"),
        ("", ""),
    ],
)
def test_a_password_is_never_shown(uri, expected):
    assert shown(uri) == expected


@pytest.mark.parametrize(
    "uri", ["", "http://host:5000", "https://h/path", "sqlite:////runs/m.db", "databricks://a",
            "postgresql+psycopg://host/mlflow"],
)  # fmt: skip
def test_stores_that_jobs_can_use(uri):
    check_tracking_uri(uri)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("htp://host:5000", "expected http://HOST:PORT"),
        ("host:5000", "expected http://HOST:PORT"),
        ("http://", "expected http://HOST:PORT"),
        ("sqlite:///mlflow.db", "path from the root"),  # of which folder, on which node?
        ("sqlite://", "path from the root"),
        ("./mlruns", "path from the root"),
        ("http://me:pa55word@host:5000", r"http://\*\*\*@host:5000: got a user or password"),
    ],
)
def test_a_store_that_no_job_can_use_is_refused_in_a_line(uri, said):
    with pytest.raises(UserError, match=said) as refused:
        check_tracking_uri(uri)
    assert "pa55word" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a/b", "a:b", "", "'; drop", " x"])
def test_names_of_models(name):
    check_model_name("table2_demo")
    if name:  # empty: the default
        with pytest.raises(UserError, match="model-name: got"):
            check_model_name(name)


def test_reasons_have_no_password():
    uri = "postgresql://me:p%40ss@db/mlflow"
    error = RuntimeError(f"cannot connect to {uri}\nmore")
    assert reason(error, uri) == "cannot connect to postgresql://***@db/mlflow"
    assert reason(RuntimeError("denied: 'p@ss' of me"), uri) == "denied: '***' of me"
    assert reason(ValueError(), uri) == "ValueError"


@pytest.mark.slow
def test_a_server_that_is_away_loses_nothing(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    port, folder = free_port(), tmp_path / "run"
    folder.mkdir()
    uri = f"http://127.0.0.1:{port}"
    log = MetricsLog(folder)
    sender = forwarder(folder, uri)
    log.write("train", 1, 0.1, loss=1.0)
    said = []
    sender.say = said.append
    assert not sender.try_to_send()  # not up yet
    assert not sender.try_to_send()
    assert len(said) == 1
    assert "Connection refused" in said[0]
    server = start_server(tmp_path, port)
    try:
        assert sender.try_to_send()
        assert "answers again" in said[1]
    finally:
        stop_server(server)
    log.write("train", 2, 0.2, loss=0.5)
    assert not sender.try_to_send()  # gone
    server = start_server(tmp_path, port)
    try:
        log.write("train", 3, 0.3, loss=0.25)
        (folder / "best.json").write_text("{}")
        sender.start()
        assert sender.finish("FINISHED")
        run_id = sender.state["run_id"]
        assert history(uri, run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
        client = mlflow.MlflowClient(tracking_uri=uri)
        assert "best.json" in {a.path for a in client.list_artifacts(run_id)}

        # A server whose address has a password: it is used, and is nowhere to be read.
        secret = uri.replace("//", "//me:pa55word@")
        other = tmp_path / "other"
        other.mkdir()
        MetricsLog(other).write("train", 1, 0.1, loss=1.0)
        (other / "best.json").write_text(json.dumps(BEST))
        caplog.set_level("DEBUG", logger="jobs")
        hidden = forwarder(other, secret)
        hidden.start()
        assert hidden.finish("FINISHED")
        print(summary(other, secret))
        run = client.get_run(hidden.state["run_id"])
        assert run.info.status == "FINISHED"
        stop_server(server)
        away = forwarder(other, secret)
        away.start()
        assert not away.finish("FINISHED", pauses=(0.1,))
        told = [*capfd.readouterr(), caplog.text, str(run.to_dictionary())]
        told += [p.read_text(errors="replace") for p in other.rglob("*") if p.is_file()]
        assert not [text for text in told if "pa55word" in text]
        assert "***@127.0.0.1" in told[0]
        assert "did not take all of" in told[0]
        assert "Connection refused" in told[0]
    finally:
        if server.poll() is None:
            stop_server(server)
