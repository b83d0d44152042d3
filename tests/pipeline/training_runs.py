"""Trainings in processes of their own, ended in every way, and what they left, compared."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.checkpoint_store import checkpoint_path, checkpoint_steps
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Speeds and peaks of memory differ from run to run; everything else must not.
TIMINGS = ("time", "images_per_second", "data_wait", "memory_gib")


def command(
    drawn: Any, recipe: str, folder: Path, *options: object, ranks: int = 1, script: str = ""
) -> list[str]:
    """`python -m pipeline train`, or `script` in its place, in the processes of a torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    program = [script] if script else ["-m", "pipeline"]
    return [
        sys.executable, *map(str, launcher if ranks > 1 else []), *program, "train", recipe,
        "--output", str(folder), "--data.train", str(drawn.shards / "train"),
        "--data.val", str(drawn.shards / "val"), "--engine.loader-workers", "0",
        *map(str, options),
    ]  # fmt: skip


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def kill_once(condition: Callable[[], object], arguments: list[str], log: Path) -> None:
    """Starts a training and kills its launcher with SIGKILL when the condition holds."""
    process = start(arguments, log)
    wait_for(condition, process, log)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun alone: its processes have other sessions
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive  # else they would train on beside the next start


def metrics(folder: Path) -> list[dict]:
    lines = [x for x in read_lines(folder / "metrics.jsonl") if x["kind"] != "event"]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def events(folder: Path, name: str) -> list[dict]:
    return [x for x in read_lines(folder / "metrics.jsonl") if x.get("event") == name]


def require_same_ends(one: Path, other: Path) -> None:
    """The metrics, and all that the last checkpoints hold, are equal to the last bit."""
    assert metrics(one) == metrics(other)
    step = checkpoint_steps(one)[-1]
    for name in ("model.pt", "training.pt"):
        mine, theirs = (torch.load(checkpoint_path(f, step) / name) for f in (one, other))
        require_same(mine, theirs, name)


def require_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            if key != "config":  # says how the work was spread, too
                require_same(value, other[key], f"{where} {key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where
