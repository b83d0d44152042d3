"""A grid on a real local Ray: one cell fails, the command is interrupted, and is given again."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.grid_status import rows
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
# Five job starts on two local clusters: minutes.
pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(600)]

GRID = """
from jobs.grid import Cell, Grid

SMALL = {"model.encoder_layers": 1, "model.decoder_layers": 1, "optimizer.batch_size": 8}
SMALL |= {"engine.log_every": 1, "engine.checkpoint_steps": 2}


def grid():
    short = SMALL | {"schedule.epochs": 1}
    cells = (
        Cell("short", "demo", short),
        Cell("late", "demo", short | {"data.train": "LATE"}),
        Cell("long", "demo", SMALL | {"schedule.epochs": 40}),
    )
    return Grid("tiny", cells, baseline="short")
"""


def train_lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return [line for line in lines if line["kind"] == "train"]


def states(folder: Path) -> dict[str, tuple[str, int]]:
    if not (folder / "grid.json").exists():
        return {}
    return {row.cell: (row.state, row.record.attempts) for row in rows(folder)}


def test_an_interrupted_grid_goes_on_with_what_is_not_done(drawn, tmp_path):
    out, late, log = tmp_path / "grid", tmp_path / "late", tmp_path / "log"
    (tmp_path / "tiny.py").write_text(GRID.replace("LATE", str(late)))
    command = [
        sys.executable, "-m", "jobs", "grid", str(tmp_path / "tiny.py"), "--output", str(out),
        "--data.train", str(drawn.shards / "train"), "--data.val", str(drawn.shards / "val"),
        "--parallel", "2",
    ]  # fmt: skip
    with log.open("w") as file:
        first = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    long, deadline = out / "runs/long-seed42", time.monotonic() + 400
    while len(train_lines(long)) < 3 or states(out)["short"] != ("done", 1):
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert first.wait(150) == 130, log.read_text()
    said = log.read_text()
    assert states(out) == {"short": ("done", 1), "late": ("failed", 1), "long": ("stopped", 1)}
    assert f"late-seed42: failed: shard folder '{late}' does not exist" in said
    assert "will be tried again" not in said  # a user's mistake comes again
    assert "Traceback" not in said
    assert f"'{late}'" in (out / "logs/tiny-late-seed42-0.log").read_text()
    before, kept = train_lines(long), (out / "runs/short-seed42/metrics.jsonl").stat().st_mtime_ns
    assert len(before) < 200

    shutil.copytree(drawn.shards / "train", late)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(out) == {"short": ("done", 1), "late": ("done", 2), "long": ("done", 2)}
    assert "short-seed42: do nothing: done" in again.stdout
    assert "long-seed42: go on after epoch" in again.stdout
    assert (out / "runs/short-seed42/metrics.jsonl").stat().st_mtime_ns == kept
    after = train_lines(long)
    assert after[: len(before)] == before  # not trained anew
    assert [line["step"] for line in after] == list(range(1, 201))
    assert json.loads((out / "runs/late-seed42/best.json").read_text())["epoch"] == 1

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert "all done" in done.stdout
    assert "submitted" not in done.stdout
