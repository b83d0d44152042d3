"""A real `mlflow server`, to be stopped and started again."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def start_server(store: Path, port: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}/m.db",
         "--artifacts-destination", f"{store}/artifacts", "--host", "127.0.0.1", "--port",
         str(port), "--workers", "1"],
        # Its runners of jobs are many processes, which nothing here uses.
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return process
        except OSError:
            time.sleep(0.3)
    raise AssertionError("the MLflow server did not start")


def stop_server(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(120)
