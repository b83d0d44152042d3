"""The optimizer's state by parameter name: exact on as many processes, and good on others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.training_state import restore

ROOT = Path(__file__).resolve().parents[2]
NAMES = {f"{stage}-{precision}" for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")}
EQUAL = {"model": 0, "exp_avg": 0, "exp_avg_sq": 0, "same_counts": True}
pytestmark = pytest.mark.slow


def engines(mode: str, folder: Path, ranks: int) -> dict:
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    script = Path(__file__).with_name("engine_states.py")
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), str(script), mode, str(folder)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_the_rest_is_exact_on_as_many_processes_and_rounded_otherwise_on_others(tmp_path):
    """Gradients of bfloat16 passes are rounded in shares of another size."""
    report = engines("whole", tmp_path, ranks=2)
    chain = report.pop("chain")
    assert report.keys() == NAMES
    for name, found in report.items():
        assert found == EQUAL, name
    report = engines("rest", tmp_path, ranks=3)
    chain |= report.pop("chain")
    assert report.keys() == NAMES
    for name, found in report.items():
        most = 1e-6 if name.endswith("fp32") else 1e-3
        assert found["same_counts"], name
        assert max(found["model"], found["exp_avg"]) < most, (name, found)
    # One training through the stages 1, 3, 2, 3 and 0, by 2, 2, 3, 3 and 1 processes.
    report = engines("alone", tmp_path, ranks=1)
    chain |= report["chain"]
    assert chain == dict.fromkeys(("3 on 2", "2 on 3", "3 on 3", "0 on 1"), EQUAL)
    assert report["end"]["same_counts"]
    assert max(report["end"]["model"], report["end"]["exp_avg"]) < 1e-6, report


class Engine:
    module = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"weight": {"exp_avg": torch.zeros(2, 3)}}, "of other parameters: bias"),
        (
            {"weight": {"exp_avg": torch.zeros(2, 4)}, "bias": {"exp_avg": torch.zeros(2)}},
            "of other shapes: weight",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        restore(Engine(), {"moments": moments}, {}, 0)
