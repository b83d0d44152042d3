"""What a grid's jobs could not tell MLflow, told by its command once they have ended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import parent_run
from jobs.forwarder import About, Forwarder
from jobs.grid_state import DONE, FAILED, RUNNING, read_grid
from jobs.grid_status import Row, rows
from jobs.tracking import choose_tracking_uri, flat, reason, remembered, shown

ENDED = {DONE: "FINISHED", FAILED: "FAILED"}  # what else does not run was stopped


def deliver(grid: Path, asked: str, say: Callable[[str], None]) -> None:
    """Sends what is left of every run, and how all of them stand. A store that does not answer is
    a line, and left to the same command, given again. asked: --tracking-uri."""
    found = rows(grid)
    folders = [grid / cell["folder"] for cell in read_grid(grid)["cells"]]
    told = {folder: remembered(folder) for folder in folders}
    before = next(filter(None, [remembered(grid), *told.values()]), None)
    if before is None:  # no job got as far as to speak of MLflow
        return
    uri = known_uri(before["uri"], asked, folders[0])
    if not uri:
        say(
            f"MLflow at {before['uri']} may not have had all of it; set MLFLOW_TRACKING_URI to "
            f"that address with its password, and the same command sends it"
        )
        return
    why = ""
    try:
        for folder, row in dict(zip(folders, found, strict=True)).items():
            why = why or send_rest(folder, told[folder], row, uri)
        if not why:
            parent_run.finish(grid, uri, found)
    except Exception as error:  # whatever MLflow is up to: the grid stands
        why = reason(error, uri)
    if why:
        say(f"MLflow at {shown(uri)} has not had all of it ({why}); the same command sends it")


def send_rest(folder: Path, before: dict[str, Any], row: Row, uri: str) -> str:
    """Why MLflow did not take what one run has; empty where it did, or has had it all."""
    status = ENDED.get(row.state, "KILLED")
    if row.state == RUNNING or (not before and row.state != DONE):
        return ""
    if (before.get("uri"), before.get("delivered")) == (shown(uri), status):
        return ""
    about = None if "about" in before else read_about(folder)
    forwarder = Forwarder(folder, uri, about, say=lambda _: None)
    forwarder.finish(status)
    return forwarder.why


def read_about(folder: Path) -> About:
    """Of a run that was not tracked: it is an evaluation of another one (jobs.grid_augmented)."""
    identity = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    grid = folder.parents[1]
    digests = {key: identity[key] for key in ("config_digest", "train_digest", "val_digest")}
    tags = {"recipe": identity["config"]["recipe"], **digests}
    return About(read_grid(grid)["name"], flat(identity["config"]), tags, grid=str(grid))


def known_uri(before: str, asked: str, folder: Path) -> str:
    """The store that jobs wrote to, or the one asked for; empty where its password is not known
    here."""
    if asked or "***@" not in before:
        return asked or before
    here = choose_tracking_uri("", folder)
    return here if shown(here) == before else ""
