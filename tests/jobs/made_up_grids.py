"""Grids of made-up run folders, and a cluster that is a script."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from jobs import grid_run
from jobs.grid import Cell, Entry, Grid, entries
from jobs.grid_pruning import Band, Pruning
from jobs.grid_run import GridRunner, Submission
from jobs.grid_state import Code, Record
from jobs.spec import JobSpec
from pipeline.config import RunConfig

CODE = Code("c0de", "commit-1")
DATA = {"train": "t0", "val": "v0"}
EPOCHS = 4


def grid_of(*names: str) -> list[Entry]:
    cells = [Cell(n, "demo", {"model.num_points": i + 1}) for i, n in enumerate(names)]
    short = "schedule.epochs"
    cells = [replace(c, changes={**c.changes, short: EPOCHS}) for c in cells]
    return entries(Grid("made", tuple(cells)), False, 1, lambda config: config)


def pretend(
    folder: Path, config: RunConfig, epochs: int, classes: int = 4, aps: Sequence[float] = ()
) -> None:
    """What training leaves in a run folder after so many of its epochs of ten steps. aps: AP after
    each, a tenth more every time unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, model=replace(config.model, num_classes=classes))
    identity = {"config": json.loads(config.to_json()), "config_digest": config.digest()}
    digests = {f"{split}_digest": digest for split, digest in DATA.items()}
    (folder / "config.json").write_text(json.dumps({**identity, **digests}))
    start = {"kind": "event", "event": "start", "step": 0, "epoch": 0.0, "time": 1000.0}
    aps = aps or [0.1 * epoch for epoch in range(1, epochs + 1)]
    lines = [{**start, "steps": 10 * config.schedule.epochs, "epochs": config.schedule.epochs}]
    for epoch in range(1, epochs + 1):
        at = {"step": 10 * epoch, "epoch": float(epoch), "time": 1000.0 + 20 * epoch}
        lines += [{"kind": "train", **at}, {"kind": "evaluation", **at, "AP": aps[epoch - 1]}]
    if epochs == config.schedule.epochs:
        lines.append({"kind": "event", "event": "finished", **at})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


class ScriptedCluster:
    """A Jobs client. `script[run]`: how its next jobs end, as driver exit statuses; a job lasts
    two looks, one of an empty script until it is stopped. One that ends with 0 leaves a finished
    run, one with 1 a run of one epoch."""

    def __init__(self, entries_: list[Entry], root: Path, **script: list[int]) -> None:
        self.entries = {str(root / e.folder): e for e in entries_}
        self.script, self.jobs, self.order = script, {}, []
        self.most, self.failing_looks = 0, 0

    def list_jobs(self):
        if self.failing_looks:
            self.failing_looks -= 1
            raise ConnectionError("refused")
        alive = [job for job in self.jobs.values() if not job.status.is_terminal()]
        self.most = max(self.most, len(alive))
        for job in alive:
            job.looks += 1
            if job.looks >= 2 and not job.endless:
                self.end(job)
        return list(self.jobs.values())

    def submit_job(self, submission_id, metadata, entrypoint="", **_):
        entry = self.entries[metadata["folder"]]
        self.order.append(entry.cell)
        status = SimpleNamespace(value="RUNNING", is_terminal=lambda: False)
        endless = self.script.get(entry.cell) == []
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, metadata=metadata, status=status, looks=0, message="",
            driver_exit_code=None, endless=endless, entrypoint=entrypoint,
        )  # fmt: skip
        return submission_id

    def end(self, job, status: str = "") -> None:
        entry = self.entries[job.metadata["folder"]]
        code = self.script[entry.cell].pop(0) if not status else 3
        folder = Path(job.metadata["folder"])
        if not status or not folder.exists():  # one that is stopped keeps what it has
            pretend(folder, entry.config, EPOCHS if code == 0 else 1)
        value = status or ("SUCCEEDED" if code == 0 else "FAILED")
        job.driver_exit_code = code
        job.status = SimpleNamespace(value=value, is_terminal=lambda: True)

    def finish(self, cell: str) -> None:
        """Ends a job of an empty script well."""
        self.script[cell] = [0]
        self.end(
            next(j for j in self.jobs.values() if self.entries[j.metadata["folder"]].cell == cell)
        )

    def stop_job(self, job_id):
        if not self.jobs[job_id].status.is_terminal():
            self.end(self.jobs[job_id], "STOPPED")

    def get_job_logs(self, job_id):
        return f"epoch 1\nerror: {job_id} broke\nlast words\n"


def scripted(root: Path, monkeypatch):
    """`make(names, places=…, retries=…, **script)`: entries, client, runner and what it said. The
    runner holds all against the first of the names."""
    monkeypatch.setattr(grid_run, "POLL", 0.0)
    monkeypatch.setattr(grid_run, "ARRIVAL", 0.0)

    def make(*names, places=9, retries=1, parallel=0, patience=9.0, band=None, prune=False,
             **script):  # fmt: skip
        monkeypatch.setattr(grid_run, "places", lambda *_: places)
        found = grid_of(*names)
        client = ScriptedCluster(found, root, **script)
        said: list[str] = []
        spec = JobSpec(config="", folder="", grace=1.0)
        submission = Submission("http://x", "made", parallel, retries, patience, spec)
        own = (root / found[0].folder,)
        pruning = Pruning(root, own, names[0], band or Band(), prune)
        return found, client, GridRunner(client, root, submission, said.append, pruning), said

    return make


def outcomes(folder: Path, found: list[Entry]) -> dict[str, tuple[str, int]]:
    records = {e.cell: Record.read(folder, e.run) for e in found}
    return {cell: (record.outcome, record.attempts) for cell, record in records.items()}
