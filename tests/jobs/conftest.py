"""Uninterrupted runs, which those that were interrupted are held against, and stores of MLflow."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.nodes import ROOT, Run, options


@pytest.fixture(scope="session")
def reference(drawn, made_once):
    """`reference(workers, epochs, …)`: the run that nothing interrupted, by torchrun."""

    def run(workers: int, epochs: int, *more: object) -> Run:
        def train(folder: Path) -> None:
            given = [str(x) for x in options(drawn, folder / "run", epochs, *more)[1:]]
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers),
                 "-m", "pipeline", "train", *given, "--engine.device", "cpu"],
                cwd=ROOT, capture_output=True, text=True, timeout=580,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr

        name = "-".join(str(word).strip("-") for word in ("reference", workers, epochs, *more))
        return Run(made_once(name, train) / "run")

    return run


@pytest.fixture(scope="session")
def unsynced() -> Iterator[None]:
    """Databases of this process do not wait for the disk. Each of MLflow's many transactions would,
    and nothing here is held against a power cut."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def set_pragma(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", set_pragma)
    yield
    event.remove(Engine, "connect", set_pragma)


@pytest.fixture(scope="session")
def empty_store(unsynced: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it, to be copied: to make one takes seconds."""
    import mlflow

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file
