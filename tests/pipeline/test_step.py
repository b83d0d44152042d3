"""A step and an evaluation that two processes take together: the gradient is the whole batch's, and
predictions that are not finite on one of them end both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.training_runs import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_two_processes_step_and_evaluate_as_one(drawn, tmp_path):
    """All boxes are in the first one's images. Moments are kept in float32, hence the bound."""
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    script = str(Path(__file__).with_name("step_cases.py"))
    done = subprocess.run(
        [sys.executable, *launcher, script, str(drawn.shards), str(tmp_path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    said = report.pop("refused")
    assert len(report) == 2
    for name, found in report.items():
        assert found["loss"] < 1e-6, name
        assert found["gradient"] < 1e-6, name
    # Told by both, once both have been to each meeting between batches.
    assert said[0] == said[1]
    assert said[0].startswith("predictions are not finite: pred_boxes (1 of 240), in images [")
