"""The files of a run folder beside its checkpoints and metrics: identity, evaluations, the best."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.checkpoint_store import (
    Progress,
    check,
    checkpoint_path,
    checkpoint_steps,
    newest_intact,
)
from pipeline.config import RunConfig
from pipeline.dataset import Dataset
from pipeline.errors import FolderInUse, UserError
from pipeline.evaluate import Evaluation
from pipeline.machine_errors import of_the_system
from pipeline.stop import STOP_FILE
from pipeline.storage import PASSING, patiently
from pipeline.tracking import read_lines
from pipeline.whole_file import PARTIAL, write_whole

# What may be in the folder of a run that has not begun: of its launcher, and the lock.
BEFORE_A_RUN = frozenset(("ray", "mlflow.json", "lock", STOP_FILE))
DYING = 60.0  # seconds in which processes of a killed training are gone
CLASS = "AP/"  # before a class's name in the log
DIGESTS = ("config_digest", "train_digest", "val_digest")


@contextmanager
def hold(folder: Path, holds: bool) -> Iterator[None]:
    """Keeps every other training out of the folder while the block lasts, if this process `holds`.

    One that was killed may take a moment to be gone, and is waited for. The lock is the kernel's,
    so it ends with its process however that ends. Raises `FolderInUse` where it does not end.
    """
    if not holds:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--output {folder} is a file, expected a folder") from None
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=DYING)
    except Timeout:
        raise FolderInUse(
            f"run folder {folder} is in use by another training, which did not end in {DYING:g} s; "
            f"stop it first, or choose another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Writes config.json, which says what the run is. Raises `UserError` where the folder is a run
    of another config or other data, or something else."""
    _refuse_foreign(folder)
    identity = {
        "config": json.loads(config.to_json()),
        "config_digest": config.digest(),
        "train_digest": dataset.train.digest,
        "val_digest": dataset.val.digest,
        "labels": asdict(dataset.labels),
    }
    path = folder / "config.json"
    before = read_identity(folder) if path.exists() else {}
    for name in DIGESTS if before else ():
        got, expected = str(identity[name]), before[name]
        if got != expected:
            what = "config" if name == "config_digest" else f"data.{name.removesuffix('_digest')}"
            said = differences(config, before) if name == "config_digest" else ""
            said = said or f"got digest {got[:12]}, expected {expected[:12]}"
            raise UserError(
                f"run folder {folder} belongs to another {what}: {said}; choose another --output"
            )
    if before != json.loads(json.dumps(identity)):  # the same lists and names as were read
        _write_json(path, identity)


def read_identity(folder: Path) -> dict[str, Any]:
    """What a run folder's config.json says. Raises `UserError` where it is damaged."""
    path = folder / "config.json"
    why = f"expected {', '.join(DIGESTS)} in it"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        before, why = None, f"it is not JSON ({error})"
    if not isinstance(before, dict) or not all(isinstance(before.get(n), str) for n in DIGESTS):
        raise UserError(
            f"{path} is damaged: {why}; put a copy of it back (MLflow has one of each job), or go "
            f"on from the weights alone: --init.weights {folder} and another --output"
        )
    return before


@contextmanager
def saying_what_is_saved(folder: Path) -> Iterator[None]:
    """Where the disk, or another part of the machine, ends a run that has a checkpoint: adds to
    the error that nothing of it is lost."""
    try:
        yield
    except OSError as error:
        newest = None
        with suppress(OSError):  # of the same storage
            newest = newest_intact(folder, lambda _: None)
        if error.errno is None or newest is None:
            raise
        raise OSError(
            f"{of_the_system(error)}; the run's checkpoints are intact, and the same command goes "
            f"on from {newest.name}"
        ) from error


def _refuse_foreign(folder: Path) -> None:
    """Raises `UserError` where the folder holds something other than a run."""
    names = {path.name for path in folder.iterdir() if path.suffix != PARTIAL}
    if names - BEFORE_A_RUN and "config.json" not in names:
        raise UserError(
            f"--output {folder} holds something else ({min(names - BEFORE_A_RUN)}); choose a new "
            f"or empty folder, or a run's"
        )


def differences(config: RunConfig, before: dict[str, Any]) -> str:
    """What decides the result and differs from the folder's config.json, as far as it can be told:
    "schedule.epochs: got 4, expected 2"."""
    try:
        old = RunConfig.from_json(json.dumps(before["config"])).identity()
    except (KeyError, ValueError):
        return ""
    return "; ".join(list(_unequal(config.identity(), old, ""))[:5])


def _unequal(mine: dict[str, Any], theirs: dict[str, Any], where: str) -> Iterator[str]:
    for name, value in mine.items():
        if isinstance(value, dict):
            yield from _unequal(value, theirs[name], f"{where}{name}.")
        elif value != theirs[name]:
            yield f"{where}{name}: got {value}, expected {theirs[name]}"


def write_evaluation(folder: Path, step: int, epoch: int, evaluation: Evaluation) -> None:
    """Writes evaluations/step-NNNNNNNN.json: the epoch, COCO's numbers and AP by class."""
    path = _evaluation_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    content = {"epoch": epoch, "summary": evaluation.summary, "per_class": evaluation.per_class}
    _write_json(path, content)


def write_detections(folder: Path, evaluation: Evaluation) -> None:
    """Writes evaluations/best-detections.json, a COCO result file, for comparisons of runs."""
    (folder / "evaluations").mkdir(exist_ok=True)
    _write_json(folder / "evaluations" / "best-detections.json", evaluation.detections, None)


def publish_best(folder: Path, progress: Progress) -> None:
    """Writes best.json: the name of the best checkpoint so far and its evaluation."""
    if progress.best_step < 0:
        (folder / "best.json").unlink(missing_ok=True)
        return
    evaluation = _evaluation(folder, progress.best_step)
    if evaluation is None:
        raise UserError(
            f"{_evaluation_path(folder, progress.best_step)}, of the best checkpoint, is missing; "
            f"put a copy of it back"
        )
    name = checkpoint_path(folder, progress.best_step).name
    _write_json(folder / "best.json", {"checkpoint": name, **evaluation})


def best_evaluated(folder: Path, progress: Progress) -> tuple[float, int]:
    """AP and step of the best checkpoint up to `progress` that is there and intact: (-1, -1) if
    none of them has been evaluated. An evaluation that is still to come, left by a process killed
    before it was in a checkpoint, is not one: made again, it may be another on a GPU."""
    steps = [progress.best_step, *checkpoint_steps(folder)]
    found = [(-1.0, -1)]
    for step in {step for step in steps if 0 <= step <= progress.step}:
        evaluation = _evaluation(folder, step)
        if evaluation and evaluation["epoch"] <= progress.epoch and _may_be_whole(folder, step):
            found.append((evaluation["summary"]["AP"], step))
    return max(found, key=lambda pair: (pair[0], -pair[1]))


def _may_be_whole(folder: Path, step: int) -> bool:
    """Whether the step's checkpoint is intact, or the disk does not give it now: then it is kept
    as if it were."""
    try:
        return check(checkpoint_path(folder, step)) is None
    except OSError as error:
        if error.errno not in PASSING:
            raise
        return True


def _evaluation(folder: Path, step: int) -> dict[str, Any] | None:
    """What was written of the step's evaluation; made again from the log where it is damaged. None
    where there is none. Raises `UserError` where it is damaged and not in the log either."""
    path = _evaluation_path(folder, step)
    try:
        text = patiently(path.read_bytes)
    except FileNotFoundError:
        return None
    if (evaluation := _parsed(text)) is not None:
        return evaluation
    logged = [
        line
        for line in read_lines(folder / "metrics.jsonl")
        if line["kind"] == "evaluation" and line["step"] == step
    ]
    if not logged:
        raise UserError(
            f"{path} is damaged, and metrics.jsonl has no evaluation of the step; put a copy of it "
            f"back, or remove it: then the best of the others counts"
        )
    values = {k: v for k, v in logged[-1].items() if k not in ("kind", "step", "time", "epoch")}
    evaluation = {
        "epoch": int(logged[-1]["epoch"]),
        "summary": {k: v for k, v in values.items() if not k.startswith(CLASS)},
        "per_class": {k.removeprefix(CLASS): v for k, v in values.items() if k.startswith(CLASS)},
    }
    _write_json(path, evaluation)
    return evaluation


def _parsed(text: bytes) -> dict[str, Any] | None:
    """An evaluation as it was written, or None where the text is none."""
    try:
        content = json.loads(text)
        whole = isinstance(content["epoch"], int) and isinstance(content["per_class"], dict)
        return content if whole and isinstance(content["summary"]["AP"], int | float) else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def _evaluation_path(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"step-{step:08d}.json"


def _write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    write_whole(path, json.dumps(content, indent=indent))
