"""What became of a grid's runs, read from their folders: no cluster is needed to tell.

A grid's folder holds `grid.json` (its cells), `runs/` (their run folders), `records/` (attempts),
`logs/` (of its jobs) and `replaced/` (runs that were trained anew).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jobs.grid import Entry
from jobs.spec import ROOT, code_version
from jobs.tracking import flat
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.tracking import read_lines
from pipeline.whole_file import write_whole

# What decides a result beside config and data.
CODE = ("cuda_ops", "model", "pipeline")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")

NOT_BEGUN, RESUME, DONE, FAILED, CHANGED = "not begun", "half done", "done", "failed", "changed"
# And FAILED, DONE: how a record's last attempt stands. PRUNED is also what --prune leaves alone,
# RUNNING without a job an attempt that is only being submitted.
RUNNING, STOPPED, PRUNED = "running", "stopped", "pruned"


@dataclass(frozen=True)
class Code:
    """Identity of the code that trains: its sources' digest decides, the commit is for people."""

    digest: str
    commit: str

    @staticmethod
    def present() -> "Code":
        digest = hashlib.sha256()
        for package in CODE:
            for path in sorted((ROOT / package).rglob("*")):
                if path.suffix in SOURCES:
                    content = path.read_bytes()
                    name = path.relative_to(ROOT).as_posix()
                    digest.update(f"{name} {len(content)}\n".encode() + content)
        return Code(digest.hexdigest(), code_version())


@dataclass(frozen=True)
class Record:
    """What the grid's command remembers of one run: attempts, each of them a job; `outcome` of the
    last one and why it failed, its job, the code of every attempt (digest -> commit), and what
    makes an unfinished run seem hopeless."""

    attempts: int = 0
    outcome: str = ""
    error: str = ""
    job: str = ""
    code: dict[str, str] = field(default_factory=dict)
    flag: str = ""

    @property
    def submitting(self) -> bool:
        """Whether the cluster has no job for the attempt yet, as far as is known here."""
        return self.outcome == RUNNING and not self.job

    @staticmethod
    def read(grid: Path, run: str) -> "Record":
        path = grid / "records" / f"{run}.json"
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Record()
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); without it attempts are counted anew: remove it"
            ) from None

    def write(self, grid: Path, run: str) -> None:
        write_json(grid / "records" / f"{run}.json", asdict(self))


def nothing_runs(grid: Path, runs: Iterable[str]) -> None:
    """Corrects the records of runs that a command left at RUNNING, and that no job trains."""
    for run in runs:
        record = Record.read(grid, run)
        if record.outcome == RUNNING:
            replace(record, outcome=STOPPED if record.job else "").write(grid, run)


@dataclass(frozen=True)
class RunProgress:
    """Read from `metrics.jsonl`. `epoch` is a fraction, `evaluated` the last
    one with an evaluation, `ap` the best so far (-1: none), `curve` epoch and AP of each, `left`
    the seconds to the end at this start's speed (-1: unknown), `last` the time of the last line."""

    epoch: float = 0.0
    epochs: int = 0
    ap: float = -1.0
    evaluated: float = 0.0
    left: float = -1.0
    finished: bool = False
    last: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()


def progress(folder: Path) -> RunProgress:
    """How far the run in `folder` is, by its metrics.jsonl; read again once that has changed."""
    path = folder / "metrics.jsonl"
    try:
        found = path.stat()
        return _progress(path, found.st_mtime_ns, found.st_size)
    except FileNotFoundError:  # it has not begun, or is being set aside
        return RunProgress()


@lru_cache(maxsize=1000)  # a grid's command looks every two seconds, also at runs that stand still
def _progress(path: Path, changed: int, size: int) -> RunProgress:
    lines = read_lines(path)
    if not lines:
        return RunProgress()
    starts = [x for x in lines if x.get("event") == "start"]
    steps = [x for x in lines if x["kind"] == "train"]
    curve = tuple((x["epoch"], x["AP"]) for x in lines if x["kind"] == "evaluation")
    left = -1.0
    if starts and steps and steps[-1]["step"] > starts[-1]["step"]:
        start, end = starts[-1], steps[-1]
        speed = (end["time"] - start["time"]) / (end["step"] - start["step"])
        left = speed * (start["steps"] - end["step"])
    return RunProgress(
        epoch=max(x["epoch"] for x in lines),
        epochs=starts[-1]["epochs"] if starts else 0,
        ap=max((ap for _, ap in curve), default=-1.0),
        evaluated=max((epoch for epoch, _ in curve), default=0.0),
        left=left,
        finished=any(x.get("event") == "finished" for x in lines),
        last=lines[-1]["time"],
        curve=curve,
    )


@dataclass(frozen=True)
class Found:
    """A run as it was found: `state`, and why it is so where that is not plain."""

    state: str
    why: str
    progress: RunProgress
    record: Record


def look(
    grid: Path, entry: Entry, data: dict[str, str], code: Code, rerun_changed_code: bool = False
) -> Found:
    """How the entry's run stands against what is asked for now.

    data: digests of "train" and "val", where this machine sees them. A run of other code is kept,
    and `why` says so, unless `rerun_changed_code`.
    """
    folder, record = grid / entry.folder, Record.read(grid, entry.run)
    path, found = folder / "config.json", progress(folder)
    state, why = RESUME, ""
    if not path.exists():
        state, why = (FAILED, record.error) if record.outcome == FAILED else (NOT_BEGUN, "")
        return Found(state, why, found, record)
    why = what_changed(path.read_text(encoding="utf-8"), entry.config, data)
    other = ", ".join(c[:12] for digest, c in record.code.items() if digest != code.digest)
    if why:
        state = CHANGED
    elif other and rerun_changed_code:
        state, why = CHANGED, f"code: trained by {other}"
    elif found.finished:
        state = DONE
    elif record.outcome == FAILED:
        state, why = FAILED, record.error
    if state in (DONE, RESUME) and other:
        why = f"code of {other}; --rerun-changed-code trains it anew"
    return Found(state, why, found, record)


def what_changed(text: str, config: RunConfig, data: dict[str, str]) -> str:
    """How a run's config.json differs from what is asked for: "schedule.epochs 6 -> 12"."""
    try:
        before = json.loads(text)
        old = identity(RunConfig.from_json(json.dumps(before["config"])))
        digests = {split: before[f"{split}_digest"] for split in data}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its config.json is damaged or of another version ({error})"
    new = identity(config)
    said = [f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
    said += [
        f"data.{split} has other content"
        for split, digest in data.items()
        if digests[split] != digest
    ]
    return ", ".join(said)


def identity(config: RunConfig) -> dict[str, Any]:
    """`config.identity()` flat, without the number of classes, which training takes from the
    data."""
    config = replace(config, model=replace(config.model, num_classes=2))
    return flat(config.identity())


def set_aside(grid: Path, entry: Entry) -> Path:
    """Moves a run that is to be trained anew out of the way, deleting nothing; returns where to."""
    folder, aside = grid / entry.folder, grid / "replaced"
    aside.mkdir(exist_ok=True)
    number = 1
    while (aside / f"{entry.run}-{number}").exists():
        number += 1
    target = aside / f"{entry.run}-{number}"
    # Last: broken off before, the run is found changed once more.
    (grid / "records" / f"{entry.run}.json").unlink(missing_ok=True)
    folder.rename(target)
    return target


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=1))


def read_grid(folder: Path) -> dict[str, Any]:
    """`grid.json` of a grid's folder. Raises `UserError` where it is none."""
    path = folder / "grid.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no grid's folder: it has no grid.json; give the --output of jobs grid, "
            f"which is outputs/grids/NAME unless given"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); submit the grid again") from None
    return content
