"""The MLflow run of a whole grid, of which the runs of its cells are children.

The first job that reaches MLflow makes it; the grid's command gives it a summary at the end. The
grid's folder remembers which it is, in `mlflow.json`.
"""

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from jobs.grid_state import DONE, FAILED, PRUNED, read_grid, write_json
from jobs.grid_status import Row
from jobs.tracking import STATE_FILE, connect, made_once, of_this_store, remembered, safe

ARTIFACTS = (
    "grid.json", "compare.html", "compare.md", "compare.csv", "compare-images.svg",
    "compare-seconds.svg",
)  # fmt: skip
LONGEST_NOTE = 5000  # characters of a description, MLflow's limit of a tag


def parent_of(client: Any, experiment: str, grid: Path, uri: str) -> str:
    """The id of the grid's run, which is made if need be and marked as running.

    Jobs that begin at the same time, on nodes that share the folder, take turns."""
    about = read_grid(grid)
    with FileLock(grid / "mlflow.lock"):
        state = of_this_store({"run_id": "", **remembered(grid)}, uri)
        state["delivered"] = ""

        def remember() -> None:
            write_json(grid / STATE_FILE, state)

        tags = {"grid": about["name"], "grid_folder": str(grid)}
        run_id = made_once(client, experiment, about["name"], tags, state, remember)
        remember()
    client.update_run(run_id, status="RUNNING")
    return run_id


def finish(grid: Path, uri: str, found: Sequence[Row]) -> None:
    """Tells the grid's run how its cells stand: best AP of each, a table, the grid's files, and its
    status. Nothing is done where it was told the same before."""
    state = of_this_store(remembered(grid), uri)
    files = [grid / name for name in ARTIFACTS if (grid / name).is_file()]
    digest = hashlib.sha256("\n".join(table(found)).encode())
    for file in files:
        digest.update(file.read_bytes())
    if state.get("delivered") == digest.hexdigest():
        return
    client, experiment_id = connect(uri, read_grid(grid)["name"])
    run_id = parent_of(client, experiment_id, grid, uri)
    had = client.get_run(run_id).data.metrics
    for name, value in summary(found).items():
        if had.get(name) != value:
            client.log_metric(run_id, name, value)
    tags = {
        "cells": ", ".join(dict.fromkeys(row.cell for row in found)),
        "seeds": ", ".join(dict.fromkeys(str(row.seed) for row in found)),
        "mlflow.note.content": "\n".join(table(found)),
    }
    for key, text in tags.items():
        client.set_tag(run_id, key, text[:LONGEST_NOTE])
    for file in files:
        client.log_artifact(run_id, str(file))
    states = {row.state for row in found}
    ended = "FAILED" if FAILED in states else "FINISHED" if states <= {DONE, PRUNED} else "KILLED"
    client.set_terminated(run_id, status=ended)
    write_json(grid / STATE_FILE, {**remembered(grid), "delivered": digest.hexdigest()})


def summary(found: Sequence[Row]) -> dict[str, float]:
    """Metrics: how many runs are done, and of every cell the best AP, as a mean over its seeds."""
    values = {"runs": float(len(found)), "runs_done": float(sum(r.state == DONE for r in found))}
    for cell in dict.fromkeys(row.cell for row in found):
        best = [row.progress.ap for row in found if row.cell == cell and row.progress.ap >= 0]
        if best:
            values[f"best_AP/{safe(cell)}"] = statistics.fmean(best)
    return values


def table(found: Sequence[Row]) -> list[str]:
    """Markdown, as MLflow shows it on the run's page."""
    lines = ["| cell | seed | state | epoch | best AP |", "|---|---|---|---|---|"]
    for row in found:
        now = row.progress
        ap = f"{now.ap:.3f}" if now.ap >= 0 else ""
        lines.append(
            f"| {row.cell} | {row.seed} | {row.state} | {now.epoch:g}/{now.epochs} | {ap} |"
        )
    return lines
