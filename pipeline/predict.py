"""A trained detector from a checkpoint, ready to run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.detr import build_model
from pipeline.checkpoint_store import load_model
from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.data.shards import ShardSet
from pipeline.dataset import open_shards
from pipeline.engine import choose_device
from pipeline.errors import UserError


@dataclass(frozen=True)
class Detector:
    model: nn.Module
    labels: Labels
    config: RunConfig
    device: torch.device

    @staticmethod
    def load(path: Path, device: Any = "auto") -> "Detector":
        """From a run folder, a checkpoint folder or a model.pt.

        Raises `UserError` when there is none, or for a device that is not there."""
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device: got {device!r}, expected auto, cpu or cuda")
        if not path.exists():
            raise UserError(f"checkpoint {str(path)!r} does not exist")
        content = load_model(path)
        try:
            config = RunConfig.from_json(content["config"])
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {error}") from None
        config = replace(config, engine=replace(config.engine, device=device))
        if device != "cuda" and not torch.cuda.is_available() and config.engine.precision == "fp16":
            config = replace(config, engine=replace(config.engine, precision="fp32"))
        chosen = choose_device(config.engine)
        model = build_model(config.model)
        model.load_state_dict(content["model"])
        labels = content["labels"]
        return Detector(
            model.to(chosen).eval(),
            Labels(tuple(labels["category_of"]), tuple(labels["names"])),
            config,
            chosen,
        )

    def open(self, location: str | Path) -> ShardSet:
        """A shard folder, or its URL, whose categories are among the detector's."""
        shards = open_shards(str(location), self.config.data)
        unknown = {int(c["id"]) for c in shards.categories} - set(self.labels.category_of)
        if unknown:
            raise UserError(
                f"{location} has categories that the checkpoint lacks: {sorted(unknown)}"
            )
        return shards
