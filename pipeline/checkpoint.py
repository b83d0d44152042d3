"""Checkpoints of a run folder: written aside, digested, renamed when complete.

A checkpoint is a folder `checkpoints/step-00000250` with DeepSpeed's files under `state/`, the
whole model as `model.pt` (read without executing code), `progress.json`, and `manifest.json` with
the SHA-256 of every file. A folder that does not match its manifest is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a run is. `step` says which global batch comes next; `epoch` ones are evaluated."""

    step: int = 0
    epoch: int = 0
    best_ap: float = -1.0
    best_step: int = -1


def save(
    engine: Any, folder: Path, progress: Progress, config: RunConfig, labels: Labels, keep: int
) -> Path:
    """Writes a checkpoint of all ranks (collective) and removes older ones: the latest `keep` and
    the best stay. Returns its folder."""
    final = checkpoint_path(folder, progress.step)
    aside = final.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(aside), tag="state", save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        content = {"world": dist.get_world_size(), **asdict(progress)}
        (aside / "progress.json").write_text(json.dumps(content), encoding="utf-8")
        torch.save(
            {
                "model": _weights(engine.module),
                "config": config.to_json(),
                "labels": asdict(labels),
                "progress": asdict(progress),
            },
            aside / "model.pt",
        )
        _write_manifest(aside)
        if final.exists():
            shutil.rmtree(final)
        os.rename(aside, final)
        _prune(folder, keep, progress.best_step)
    dist.barrier()
    return final


def resume(engine: Any, folder: Path, warn: Any) -> Progress | None:
    """Loads the newest intact checkpoint into the engine (collective), or returns None.

    `warn(message)` is told of every checkpoint that had to be passed over. Raises `UserError` when
    it was written by another number of processes.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        intact = newest_intact(folder, warn)
        if intact is not None:
            found = [str(intact), json.loads((intact / "progress.json").read_text("utf-8"))]
    dist.broadcast_object_list(found, src=0)
    path, content = found
    if path is None:
        return None
    world = content.pop("world")
    if world != dist.get_world_size():
        raise UserError(
            f"{path} was written by {world} processes, got {dist.get_world_size()}; "
            f"resume with {world}, or choose another --output"
        )
    loaded, _ = engine.load_checkpoint(path, tag="state")
    assert loaded is not None, f"DeepSpeed loaded nothing from {path}"
    return Progress(**content)


def newest_intact(folder: Path, warn: Any) -> Path | None:
    """The newest checkpoint of the run folder that matches its manifest."""
    for path in sorted((folder / "checkpoints").glob("step-*[0-9]"), reverse=True):
        problem = check(path)
        if problem is None:
            return path
        warn(f"checkpoint {path.name} is passed over: {problem}")
    return None


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file matches its digest."""
    manifest = path / "manifest.json"
    if not manifest.exists():
        return "it has no manifest.json"
    try:
        digests = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"its manifest.json is not JSON ({error})"
    for name, expected in digests.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} is not what was written (SHA-256 differs)"
    return None


def load_model(path: Path) -> dict[str, Any]:
    """`model.pt` of a checkpoint folder: {model, config, labels, progress}, on the CPU.

    `path` may be the checkpoint, the file itself, or a run folder (its best, else its newest).
    Raises `UserError` when there is none.
    """
    file = path
    if (path / "checkpoints").is_dir():
        best = path / "best.json"
        name = json.loads(best.read_text())["checkpoint"] if best.exists() else None
        chosen = path / "checkpoints" / name if name else newest_intact(path, lambda _: None)
        if chosen is None:
            raise UserError(f"run folder {path} holds no intact checkpoint yet")
        file = chosen
    if file.is_dir():
        file = file / "model.pt"
    if not file.exists():
        raise UserError(
            f"{path} is not a checkpoint: expected a run folder, a step-… folder in "
            f"its checkpoints/, or a model.pt"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} cannot be read as a checkpoint: {error}") from None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in module.state_dict().items()}


def _write_manifest(folder: Path) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        digests[str(file.relative_to(folder))] = _sha256(file)
    with (folder / "manifest.json").open("w", encoding="utf-8") as opened:
        json.dump(digests, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _prune(folder: Path, keep: int, best_step: int) -> None:
    present = sorted((folder / "checkpoints").glob("step-*[0-9]"))
    for path in present[:-keep]:
        if path != checkpoint_path(folder, best_step):
            shutil.rmtree(path)
