"""Metrics reach MLflow once each, through restarts, rewinds and a server that is away."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

from jobs.summary import summary
from jobs.tracking import Forwarder, choose_tracking_uri, default_tracking_uri, metric_name, shown
from pipeline.follow import Tail
from pipeline.progress import ProgressPrinter
from pipeline.recipes import recipe
from pipeline.tracking import MetricsLog

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


def forwarder(folder, uri):
    return Forwarder(folder, recipe("demo"), uri, "tests", {"recipe": "demo"})


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


def test_every_metric_arrives_once_through_restart_and_rewind(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    uri = default_tracking_uri(folder)
    log = MetricsLog(folder)
    first = forwarder(folder, uri)
    for step in range(1, 6):
        log.write("train", step, step / 10, loss=10.0 / step)
    log.write("evaluation", 5, 0.5, AP=0.25, **{"AP/traffic light (new)": 0.5})
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


def test_an_attempt_that_died_before_it_remembered_doubles_nothing(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    uri, log = default_tracking_uri(folder), MetricsLog(folder)
    for step in (1, 2, 3):
        log.write("train", step, step / 10, loss=1.0 / step)
    log.write("evaluation", 3, 0.3, AP=0.5)
    first = forwarder(folder, uri)
    first.open()
    remembered = first.state_path.read_text()
    assert first.try_to_send()
    first.state_path.write_text(remembered)  # killed after sending
    log.rewind(1, 0)
    for step in (2, 3, 4):  # the same numbers, at other times
        log.write("train", step, step / 10, loss=1.0 / step)
    log.write("evaluation", 3, 0.3, AP=0.5)
    second = forwarder(folder, uri)
    assert second.try_to_send()
    assert history(uri, second.state["run_id"], "train/loss") == [
        (step, 1.0 / step) for step in (1, 2, 3, 4)
    ]
    assert history(uri, second.state["run_id"], "val/AP") == [(3, 0.5)]


def test_an_attempt_that_died_while_it_made_the_run_leaves_one(tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    uri = default_tracking_uri(folder)
    first = forwarder(folder, uri)
    first.open()
    state = {**first.state, "run_id": ""}  # killed before its id was written down
    first.state_path.write_text(json.dumps(state))
    second = forwarder(folder, uri)
    assert second.try_to_send()
    assert second.state["run_id"] == first.state["run_id"]
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    # An option of execution has changed since: MLflow keeps what it was told first.
    config = recipe("demo")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, log_every=7))
    third = Forwarder(folder, config, uri, "tests", {})
    assert third.try_to_send()


def test_more_metrics_than_one_batch_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.tracking.MOST_METRICS", 5)
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(store, port):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}/m.db",
         "--artifacts-destination", f"{store}/artifacts", "--host", "127.0.0.1", "--port",
         str(port), "--workers", "1"],
        # Its runners of jobs are many processes, which nothing here uses.
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return process
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the MLflow server did not start")


def stop_server(process):
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


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
    assert not sender.try_to_send()  # not up yet
    server = start_server(tmp_path, port)
    try:
        assert sender.try_to_send()
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
        assert not away.finish("FINISHED")
        assert "did not answer" in caplog.text
        told = [*capfd.readouterr(), caplog.text, str(run.to_dictionary())]
        told += [p.read_text(errors="replace") for p in other.rglob("*") if p.is_file()]
        assert not [text for text in told if "pa55word" in text]
        assert "***@127.0.0.1" in told[0]
    finally:
        if server.poll() is None:
            stop_server(server)
