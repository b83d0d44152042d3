"""Uninterrupted runs, which those that were interrupted are held against."""

import os
import subprocess
import sys

import pytest

from tests.jobs.nodes import ROOT, Run, options


@pytest.fixture(scope="session")
def reference(drawn, tmp_path_factory):
    """`reference(workers, epochs, …)`: the run that nothing interrupted, by torchrun."""
    made: dict[tuple, Run] = {}

    def run(workers: int, epochs: int, *more: object) -> Run:
        if (workers, epochs, more) not in made:
            folder = tmp_path_factory.mktemp("reference") / "run"
            given = [str(x) for x in options(drawn, folder, epochs, *more)[1:]]
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers),
                 "-m", "pipeline", "train", *given, "--engine.device", "cpu"],
                cwd=ROOT, capture_output=True, text=True, timeout=280,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            made[workers, epochs, more] = Run(folder)
        return made[workers, epochs, more]

    return run
