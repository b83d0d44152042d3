"""A grid on a real local Ray: cells fail, are pruned, are interrupted, and are submitted again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cluster import local_cluster
from jobs.grid_state import progress
from jobs.grid_status import rows
from jobs.measured import read_run
from jobs.noise import DETECTIONS
from pipeline.checkpoint_store import checkpoint_steps
from pipeline.data.shards import ShardSet
from pipeline.evaluate import ground_truth, summarize
from pipeline.tracking import read_lines
from tests.jobs.made_up_runs import write_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

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


def command_line(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture
def cluster(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # which a local cluster sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    # Beside other tests memory may be short, and Ray would kill workers that are to succeed.
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    with local_cluster() as started:
        yield started.jobs


FOUR = """
from jobs.grid import Cell, Grid

SMALL = {"model.encoder_layers": 1, "model.decoder_layers": 1, "optimizer.batch_size": 8}
SMALL |= {"schedule.epochs": 1}


def grid():
    cells = (
        # A terabyte.
        Cell("broken", "deformable_detr_r50_demo", SMALL | {"model.num_queries": 2**31 - 1}),
        Cell("short_tta", "demo", SMALL, tta=True),
        Cell("hopeless", "demo", SMALL | {"schedule.epochs": 500}),
        Cell("short", "demo", SMALL),
    )
    return Grid("four", cells, baseline="short")
"""


@pytest.fixture
def command(drawn, cluster, tmp_path):
    (tmp_path / "four.py").write_text(FOUR)
    return [
        "jobs", "grid", tmp_path / "four.py", "--output", tmp_path / "grid", "--address", cluster,
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--restarts", "0",
    ]  # fmt: skip


def test_a_cell_that_fails_is_retried_and_alone_runs_again(drawn, command, tmp_path):
    out, several = tmp_path / "grid", ("--only", "short", "short_tta", "broken")
    done = command_line(*command, *several)
    assert done.returncode == 2, done.stdout + done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert "1 of 4 cells are not done: broken (failed);" in said
    submitted = re.findall(r"(\S+)-seed42: submitted", done.stdout)
    assert submitted[0] == "short"  # what the others are held against
    assert submitted.index("short") < submitted.index("short_tta")
    ended = {"short": ("done", 1), "short_tta": ("done", 1), "hopeless": ("not begun", 0)}
    assert states(out) == {**ended, "broken": ("failed", 2)}
    assert done.stdout.count("broken-seed42: will be tried again") == 1
    assert re.search(r"broken-seed42: failed: .*can't allocate memory", done.stdout)
    augmented = read_run(out / "runs/short_tta-seed42")
    assert (augmented.finished, augmented.problems) == (True, ())
    found = json.loads((augmented.folder / DETECTIONS).read_text())
    truth = ground_truth(ShardSet(drawn.shards / "val"))
    ap = summarize(truth, found).summary["AP"]
    assert augmented.best.metrics["AP"] == pytest.approx(100 * ap, abs=1e-9)

    again = command_line(*command, *several, "--dry-run")
    assert again.returncode == 0, again.stdout + again.stderr
    would = dict(re.findall(r"^(\S+) +42 +[\d-]+ +(\w+)", again.stdout, re.M))
    assert would == {"broken": "train", "short_tta": "do", "short": "do", "hopeless": "be"}
    shown = command_line("jobs", "status", "--grid", out).stdout
    assert re.search(r"^short +42 +done +1.0/1 +\d\.\d+ +- +1$", shown, re.M)
    assert re.search(r"^broken +42 +failed .*RuntimeError: ", shown, re.M)
    assert shown.splitlines()[-1] == "4 cells: 1 failed, 2 done, 1 not begun"


@pytest.mark.chaos
def test_a_hopeless_cell_is_saved_and_pruned(drawn, command, tmp_path):
    out, best = tmp_path / "grid", tmp_path / "best"
    write_run(best, [0.9] * 500, val_digest=ShardSet(drawn.shards / "val").digest)
    prune = [
        "--only", "hopeless", "--prune", "--reference", best, "--band.after", "0",
        "--band.evaluations", "1",
    ]  # fmt: skip
    done = command_line(*command, *prune)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 of 4 cells are not done: hopeless (pruned);" in done.stderr
    assert "hopeless-seed42: saving, to be pruned" in done.stdout
    assert re.search(r"pruned: AP \S+ at epoch \d+ is below 0.450, the band of best", done.stdout)
    pruned = progress(out / "runs/hopeless-seed42")
    assert 1 <= pruned.evaluated < 500
    assert checkpoint_steps(out / "runs/hopeless-seed42")  # saved, to go on from
    again = command_line(*command, *prune)
    assert "hopeless-seed42: do nothing: pruned (AP " in again.stdout
    assert states(out)["hopeless"] == ("pruned", 1)
    assert progress(out / "runs/hopeless-seed42") == pruned


# Five job starts on two local clusters: minutes.
@pytest.mark.chaos
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
