"""Metrics reach MLflow once each, through restarts, rewinds and a server that is away."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

from jobs.tracking import Forwarder, default_tracking_uri, metric_name
from pipeline.follow import Tail
from pipeline.progress import ProgressPrinter
from pipeline.recipes import recipe
from pipeline.tracking import MetricsLog


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
def test_a_server_that_is_away_loses_nothing(tmp_path, monkeypatch):
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
    finally:
        stop_server(server)
