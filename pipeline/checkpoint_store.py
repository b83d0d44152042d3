"""Checkpoints of a run folder on disk: written aside, digested, renamed when complete.

A checkpoint is a folder `checkpoints/step-00000250` with the model as `model.pt`, what training
needs beside it as `training.pt`, `progress.json`, and `manifest.json` with the SHA-256 of every
file. A folder that does not match its manifest is not a checkpoint: a training that finds one moves
it aside, as `step-00000250.damaged`. One that the disk does not give, which may pass, is passed
over and left as it is. Reading executes no code.
"""

import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.weights import why_unread
from pipeline import torch_file
from pipeline.errors import UserError
from pipeline.machine_errors import naming, of_the_system
from pipeline.storage import PASSING, patiently
from pipeline.whole_file import flush

NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
MANIFEST = "manifest.json"
BEFORE_IT = "remove this checkpoint, and the one before it is taken"


@dataclass(frozen=True)
class Progress:
    """How far a run is. `step` says which global batch comes next; `epoch` ones are evaluated;
    `skipped` steps in a row were left out just before."""

    step: int = 0
    epoch: int = 0
    skipped: int = 0
    best_ap: float = -1.0
    best_step: int = -1


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a run folder has its checkpoint of a step, be it there or not."""
    return folder / "checkpoints" / f"step-{step:08d}"


def write(folder: Path, progress: Progress, model: dict[str, Any], training: Any) -> Path:
    """Writes a checkpoint of the run folder and returns where it is. Until the last moment it is
    not there at all, or is the one that it replaces: of before the evaluation.

    Lines of metrics and evaluations up to the step are on the disk before it is there. Raises
    `OSError` where the disk is full or closed; whatever was there before is still there."""
    final = checkpoint_path(folder, progress.step)
    aside = final.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(json.dumps(asdict(progress)), aside / "progress.json")
        for content, name in ((model, "model.pt"), (training, "training.pt")):
            torch_file.save(content, aside / name)
            flush(aside / name)
        _write_manifest(aside)
        _flush_run(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    before = final.with_suffix(".old")
    shutil.rmtree(before, ignore_errors=True)
    if final.exists():
        os.rename(final, before)
    os.rename(aside, final)  # killed before it, the next start finds `before`
    flush(final.parent)
    shutil.rmtree(before, ignore_errors=True)
    return final


def _write(text: str, file: Path) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of all checkpoints that the run folder has, intact or not, in order."""
    names = [path.name for path in _folders(folder)]
    return sorted(int(name[5:]) for name in names if NAME.fullmatch(name))


def _folders(folder: Path, suffix: str = "") -> list[Path]:
    """Those of checkpoints in the run folder, whole or not, with this suffix."""

    def found() -> list[Path]:
        # Path.glob finds nothing where it may not read: a run would begin anew.
        with os.scandir(folder / "checkpoints") as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]

    try:
        return [p for p in patiently(found) if p.suffix == suffix and p.name.startswith("step-")]
    except FileNotFoundError:
        return []


def newest_intact(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of the run folder that matches its manifest. `warn(message)` is told of
    every one that had to be passed over. Raises `OSError` where there may be one that the disk does
    not give, and none besides."""
    found = _search(folder)
    for path, problem in found.damaged:
        warn(f"checkpoint {path.name} is passed over: {problem}")
    found.tell_unread(warn)
    return found.newest


def take_over(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, for the one process that holds the run folder.

    Ends what a killed process has left half done. Damaged ones that are passed over are moved
    aside: they are kept until a start passes over others. Raises as `newest_intact`."""
    for path in _folders(folder, ".old"):
        final = path.with_suffix("")
        if check(final) is not None:  # killed between the two renames of `write`, or damaged since
            shutil.rmtree(final, ignore_errors=True)
            os.rename(path, final)
    for left in (*_folders(folder, ".old"), *_folders(folder, ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    found = _search(folder)
    if found.damaged:
        for earlier in _folders(folder, ".damaged"):
            shutil.rmtree(earlier, ignore_errors=True)
    for path, problem in found.damaged:
        aside = path.with_suffix(".damaged")
        try:
            os.rename(path, aside)
            kept = f"it is kept as {aside.name}"
        except OSError as error:
            kept = f"it stays ({of_the_system(error)})"
        warn(f"checkpoint {path.name} is passed over: {problem}; {kept}")
    found.tell_unread(warn)
    return found.newest


@dataclass(frozen=True)
class _Found:
    """The newest intact checkpoint, and each newer one with what is wrong with it: damaged, or not
    to be read now."""

    newest: Path | None
    damaged: list[tuple[Path, str]]
    unread: list[tuple[Path, OSError]]

    def tell_unread(self, warn: Callable[[str], None]) -> None:
        if self.unread and self.newest is None:  # all would be lost
            raise self.unread[0][1]
        for path, error in self.unread:
            why = error.strerror or str(error)
            warn(f"checkpoint {path.name} is passed over: it cannot be read ({why}); it stays")


def _search(folder: Path) -> _Found:
    while True:
        steps = checkpoint_steps(folder)
        found = _search_among(folder, steps)
        if found.newest or steps == checkpoint_steps(folder):
            return found  # else a training has removed them for newer ones


def _search_among(folder: Path, steps: list[int]) -> _Found:
    found = _Found(None, [], [])
    for step in reversed(steps):
        path = checkpoint_path(folder, step)
        try:
            problem = check(path)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            found.unread.append((path, error))
            continue
        if problem is None:
            return replace(found, newest=path)
        found.damaged.append((path, problem))
    return found


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file matches its digest. Raises
    `OSError` where the disk does not give it, not even after pauses."""
    try:
        return patiently(lambda: _check(path))
    except FileNotFoundError as error:  # a training prunes it at this moment
        return f"{Path(error.filename).name} is missing"


def _check(path: Path) -> str | None:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}"
    try:
        digests = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"its {MANIFEST} is not JSON ({error})"
    if not isinstance(digests, dict) or "model.pt" not in digests:
        return f"its {MANIFEST} does not name the files with their digests"
    for name, expected in digests.items():
        file = path / name
        if "\0" in name or not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def load_progress(path: Path) -> Progress:
    """Raises `UserError` where the checkpoint is of a version with another format."""
    try:
        content = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}/progress.json is damaged: {error}; {BEFORE_IT}") from None
    fields = Progress.__dataclass_fields__
    if not isinstance(content, dict) or content.keys() != set(fields):
        raise UserError(
            f"{path} was written by another version of this software; finish the run with that "
            f"one, or start from its weights: --init.weights {path} and another --output"
        )
    for name, value in content.items():
        if type(value) is not int and not (name == "best_ap" and type(value) is float):
            raise UserError(
                f"{path}/progress.json is damaged: {name} is {value!r:.40}; {BEFORE_IT}"
            )
    return Progress(**content)


def load_training(path: Path) -> dict[str, Any]:
    """`training.pt` of a checkpoint folder, on the CPU."""
    return torch.load(path / "training.pt", map_location="cpu", weights_only=True)


def load_model(path: Path) -> dict[str, Any]:
    """`model.pt` of a checkpoint folder: {model, config, labels, progress}, on the CPU.

    `path` may be the checkpoint, the file itself, or a run folder (its best, else its newest).
    Raises `UserError` when there is none.
    """
    if (path / "checkpoints").is_dir():
        chosen = _best_or_newest(path)
        try:
            return load_model(chosen)
        except UserError:
            if (chosen / "model.pt").exists():
                raise
            return load_model(path)  # a training has removed it for a newer one
    file = path / "model.pt" if path.is_dir() else path
    if not file.exists() and (path / "config.json").is_file():
        raise UserError(
            f"run folder {path} has no checkpoint yet; training writes one at the end of each "
            f"epoch, and every --engine.checkpoint-minutes within one"
        )
    if not file.exists():
        raise UserError(
            f"{path} is not a checkpoint: expected a run folder, a step-… folder in "
            f"its checkpoints/, or a model.pt"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles in other protocols
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind trips the reader in every way there is
        if isinstance(error, OSError) and error.errno in PASSING:
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise UserError(f"{file} cannot be read as a checkpoint: {why_unread(error)}") from None
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{file} is not a model.pt; give the checkpoint's folder or its model.pt")
    if why := _misshapen(content):
        raise UserError(
            f"{file} is not a model.pt of ours: {why}; a published checkpoint is for --init.weights"
        )
    return content


def load_plain(path: Path) -> dict[str, Any] | None:
    """The weights that training goes on with, of a checkpoint folder whose `model.pt` has their
    moving average, on the CPU; None where `model.pt` has them itself. `path`: as in `load_model`.

    Raises `UserError` where the checkpoint's `training.pt` is not there."""
    if (path / "checkpoints").is_dir():
        path = _best_or_newest(path)
    folder = path if path.is_dir() else path.parent
    if not (folder / "training.pt").exists():
        raise UserError(
            f"{path} has no training.pt beside it, which has the plain weights; give a run folder "
            f"or a checkpoint in it"
        )
    return load_training(folder).get("weights")


def _misshapen(content: dict[str, Any]) -> str:
    """What a model.pt lacks, judged by itself; empty where it lacks nothing."""
    weights, labels = content["model"], content.get("labels")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        return "its model is not a dict of tensors"
    if not isinstance(content.get("config"), str):
        return "it has no config"
    columns, names = (
        (labels.get("category_of"), labels.get("names")) if isinstance(labels, dict) else ([], [])
    )
    if (
        not isinstance(columns, list | tuple)
        or not isinstance(names, list | tuple)
        or not 0 < len(columns) == len(names)
        or not all(type(column) is int for column in columns)
        or not all(isinstance(name, str) for name in names)
    ):
        return "its labels are not a list of category ids and one of names"
    return ""


def _best_or_newest(run: Path) -> Path:
    """The best checkpoint of a run folder, the newest where there is no best that is intact."""
    name, said = _named_best(run / "best.json"), ""
    while name and not said:
        path = run / "checkpoints" / name
        problem = check(path)
        if problem is None:
            return path
        before, name = name, _named_best(run / "best.json")
        if name == before:  # else a training has removed it for a better one
            said = f"the best checkpoint {path.name} is passed over: {problem}"
    newest = newest_intact(run, lambda _: None)
    if newest is None:
        raise UserError(f"run folder {run} holds no intact checkpoint" + (said and f"; {said}"))
    if said:
        print(said, file=sys.stderr)
    return newest


def _named_best(file: Path) -> str:
    """The checkpoint that best.json names; empty where there is no such file."""
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["checkpoint"]
    except FileNotFoundError:
        return ""
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}); give a checkpoint itself, such "
            f"as {file.parent}/checkpoints/step-…"
        ) from None
    if not isinstance(name, str) or not re.fullmatch(r"step-\d+", name):
        raise UserError(
            f"{file} is damaged: its checkpoint is {reprlib.repr(name)}, expected step-…"
        )
    return name


def prune(
    folder: Path, step: int, keep: int, kept_steps: Collection[int], warn: Callable[[str], None]
) -> None:
    """Removes checkpoints up to `step`; the latest `keep` of them and those of `kept_steps` stay.

    Later ones are left: the run went on from an earlier one, because they could not be read.
    `warn(message)` is told of what cannot be removed.
    """
    for old in [x for x in checkpoint_steps(folder) if x <= step][:-keep]:
        if old not in kept_steps:
            try:
                shutil.rmtree(checkpoint_path(folder, old))
            except FileNotFoundError:  # by somebody else, meanwhile
                pass
            except OSError as error:
                warn(f"an old checkpoint cannot be removed: {of_the_system(error)}")


def _write_manifest(folder: Path) -> None:
    digests = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digests[str(file.relative_to(folder))] = _sha256(file)
    manifest = folder / MANIFEST
    _write(json.dumps(digests, indent=1), manifest)
    flush(folder)


def _flush_run(folder: Path) -> None:
    """What the run has logged, and the names in its folder."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        flush(metrics)
    flush(folder)


def _sha256(file: Path) -> str:
    with naming(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
