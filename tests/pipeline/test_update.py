"""Optimizer steps against plain torch on the whole batch: shares of ranks, passes, loss scale,
clipping by the true global norm, and a step that is left out."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.update import GROWTH_STEPS, LossScale

ROOT = Path(__file__).resolve().parents[2]
# Of the way that weights have gone, and of the gradient's norm: fp32 sums in another order, the
# others round each pass.
MOST = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
MOST_NORM = {"fp32": 1e-6, "bf16": 5e-3, "fp16": 1e-3}


@pytest.mark.slow
def test_steps_are_those_of_plain_torch(tmp_path):
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("update_cases.py")),
         str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    # A resumed run goes on with the loss scale of its checkpoint, on both ranks.
    assert report.pop("resumed") == [asdict(LossScale(2.0**15, dynamic=True, steps=1))] * 2
    assert report.keys() == {f"{stage}-{precision}" for stage in (0, 1, 2, 3) for precision in MOST}
    for name, found in report.items():
        precision = name[2:]
        assert found["weights"] < MOST[precision], name
        assert max(map(abs, found["norms"])) < MOST_NORM[precision], name
        assert {True, False} == set(found["clipped"]), name
        assert found["kept"], name  # the bad step changed nothing, each other one did
        assert found["updates"] == 7, name
        scales = [2.0**16] * 5 + [2.0**15] * 3 if precision == "fp16" else [1.0] * 8
        assert found["scales"] == scales, name


def test_the_loss_scale_grows_after_a_stretch_and_is_never_below_one():
    scale = LossScale.of("fp16")
    for _ in range(GROWTH_STEPS - 1):
        scale.update(applied=True)
    assert scale.value == 2**16
    scale.update(applied=True)
    assert (scale.value, scale.steps) == (2**17, 0)
    for _ in range(30):
        scale.update(applied=False)
    assert scale.value == 1
    for precision in ("fp32", "bf16"):
        scale = LossScale.of(precision)
        scale.update(applied=False)
        assert scale == LossScale(1.0)
