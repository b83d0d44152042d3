"""The files of a run folder beside its checkpoints and metrics: identity, evaluations, the best."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.checkpoint_store import Progress, checkpoint_path
from pipeline.config import RunConfig
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.evaluate import Evaluation


def claim(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Writes config.json, which says what the run is. Raises `UserError` where the folder is a run
    of another config or other data."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "config": json.loads(config.to_json()),
        "config_digest": config.digest(),
        "train_digest": dataset.train.digest,
        "val_digest": dataset.val.digest,
        "labels": asdict(dataset.labels),
    }
    path = folder / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for part in ("config", "train", "val"):
            got, expected = identity[f"{part}_digest"], before[f"{part}_digest"]
            if got != expected:
                what = "config" if part == "config" else f"data ({part})"
                raise UserError(
                    f"run folder {folder} belongs to another {what}: got digest {got[:12]}, "
                    f"expected {expected[:12]}; choose another --output"
                )
    _write_json(path, identity)


def write_evaluation(folder: Path, step: int, epoch: int, evaluation: Evaluation) -> None:
    path = _evaluation_path(folder, step)
    path.parent.mkdir(exist_ok=True)
    content = {"epoch": epoch, "summary": evaluation.summary, "per_class": evaluation.per_class}
    _write_json(path, content)


def publish_best(folder: Path, progress: Progress) -> None:
    """Writes best.json: the name of the best checkpoint so far and its evaluation."""
    if progress.best_step < 0:
        return
    evaluation = json.loads(_evaluation_path(folder, progress.best_step).read_text("utf-8"))
    name = checkpoint_path(folder, progress.best_step).name
    _write_json(folder / "best.json", {"checkpoint": name, **evaluation})


def _evaluation_path(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"step-{step:08d}.json"


def _write_json(path: Path, content: Any) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(aside, path)
