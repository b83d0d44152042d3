"""A grid on a real local Ray beside a real MLflow server that goes away in the middle of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from pipeline.tracking import read_lines
from tests.jobs.mlflow_server import start_server, stop_server
from tests.jobs.nodes import ROOT
from tests.ports import free_port

# Two jobs at once on a local cluster, and a server that is started twice: minutes.
pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

GRID = """
baseline: demo
set:
  model.encoder_layers: 1
  model.decoder_layers: 1
  optimizer.batch_size: 8
  schedule.epochs: 12
  engine.log_every: 1
axes:
  model.num_points: [4, 1]
"""


def has_sent(state: Path) -> bool:
    return bool(json.loads(state.read_text())["sent"])


def test_nothing_is_missing_or_doubled(drawn, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(GRID)
    out, port = tmp_path / "grid", free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "jobs", "grid", str(tmp_path / "tiny.yaml"), "--output", str(out),
        "--data.train", str(drawn.shards / "train"), "--data.val", str(drawn.shards / "val"),
        "--tracking-uri", uri, "--model-name", "tiny",
    ]  # fmt: skip
    log = (tmp_path / "log").open("w+")
    server = start_server(tmp_path, port)
    grid = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while not any(map(has_sent, out.glob("runs/*/mlflow.json"))):
            assert grid.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        stop_server(server)
    assert grid.wait(600) == 0, (tmp_path / "log").read_text()
    assert "the same command sends it" in (tmp_path / "log").read_text()

    server = start_server(tmp_path, port)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        for _ in range(2):
            again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert again.returncode == 0, again.stdout + again.stderr
            assert "submitted" not in again.stdout
            assert "MLflow" not in again.stdout
        experiment = client.get_experiment_by_name("tiny").experiment_id
        found = client.search_runs([experiment])
        (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        children = {run.info.run_name: run for run in found if run is not parent}
        assert set(children) == {"baseline-seed42", "num_points=1-seed42"}
        for name, run in children.items():
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert run.info.status == "FINISHED"
            lines = read_lines(out / "runs" / name / "metrics.jsonl")
            for kind, key in (("train", "loss"), ("train", "epoch"), ("evaluation", "AP")):
                where = f"{'val' if kind == 'evaluation' else kind}/{key}"
                had = client.get_metric_history(run.info.run_id, where)
                written = [(x["step"], x[key]) for x in lines if x["kind"] == kind]
                assert [(m.step, m.value) for m in had] == written
            system = read_lines(out / "runs" / name / "system.jsonl")
            had = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
            assert [m.step for m in had] == [line["step"] for line in system]
            figures = {a.path for a in client.list_artifacts(run.info.run_id, "figures")}
            assert "figures/precision_recall.png" in figures
        assert parent.info.status == "FINISHED"
        assert parent.data.metrics["runs_done"] == 2
        versions = client.search_model_versions("name = 'tiny'")
        assert sorted(v.run_id for v in versions) == sorted(
            run.info.run_id for run in children.values()
        )
        best = client.get_model_version_by_alias("tiny", "best")
        assert float(best.tags["val/AP"]) == max(float(v.tags["val/AP"]) for v in versions)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # which the next line sets, too
        mlflow.set_tracking_uri(uri)
        model = mlflow.pyfunc.load_model("models:/tiny@best")  # by way of the server
        assert not model.predict([str(next((drawn.coco / "val").glob("*")))]).empty
    finally:
        stop_server(server)
