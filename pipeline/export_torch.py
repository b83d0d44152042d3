"""A detector as torch's own archive of a graph (.pt2), and as weights without pickle."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model.detr import build_model
from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.errors import UserError
from pipeline.export_check import Run
from pipeline.export_graph import exported
from pipeline.export_metadata import metadata
from pipeline.predict import Detector

METADATA = "metadata.json"
"""The archive's extra file."""


def write_archive(detector: Detector, path: Path) -> None:
    """What `torch.export.load` reads wherever torch is. Raises `UserError` as `exported` does."""
    texts = metadata(detector)
    joined = ", ".join(f'"{name}": {text}' for name, text in texts.items())
    torch.export.save(exported(detector), path, extra_files={METADATA: f"{{{joined}}}"})


def archive_runner(path: Path) -> Run:
    """The file as `torch.export.load` gives it."""
    module = torch.export.load(path).module()

    def run(images: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            scores, labels, boxes = module(images, sizes)
        return scores, labels, boxes

    return run  # type: ignore[return-value]


def write_safetensors(detector: Detector, path: Path) -> None:
    """The weights under this repository's names, with the metadata in the file's header."""
    tensors = {k: v.cpu().contiguous() for k, v in detector.model.state_dict().items()}
    path.write_bytes(save(tensors, metadata(detector)))  # its save_file keeps others from reading


def read_safetensors(path: Path) -> Detector:
    """The detector that `write_safetensors` wrote, on the CPU.

    Raises `UserError` for a file that cannot be read or lacks what it should have.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    try:
        config = RunConfig.from_json(texts["config"])
        labels = Labels(tuple(json.loads(texts["category_ids"])), tuple(json.loads(texts["names"])))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not an export of this repository: {error}") from None
    model = build_model(config.model)
    model.load_state_dict(tensors)
    return Detector(model.eval(), labels, config, torch.device("cpu"))
