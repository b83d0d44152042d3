"""Checkpoints to export, and what they detect by the path of evaluation."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from model.detr import build_model
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.data.augment import Example
from pipeline.data.batch import collate
from pipeline.data.labels import Labels
from pipeline.evaluate import predict
from pipeline.recipes import recipe

LABELS = Labels((-1, 1, 2, -1), ("", "cat", "dog", ""))


def tiny(name: str, **changes: object) -> RunConfig:
    """A recipe at demo scale with two layers, for images as they are."""
    config = recipe(name)
    shape = {"num_classes": 4, "num_queries": 12, "encoder_layers": 1, "decoder_layers": 2}
    augment = replace(config.augment, val_short_side=0, max_side=160)
    return replace(config, model=replace(config.model, **shape | changes), augment=augment)


def lively(config: RunConfig) -> torch.nn.Module:
    """Random weights with which different places get different boxes and scores."""
    torch.manual_seed(1)
    model = build_model(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offsets" in name:
                parameter.normal_(0, 0.3)
            elif name == "queries.embed":
                parameter.normal_(0, 3.0)
            elif name == "heads.classes.weight":  # of a DETR, whose queries differ little
                parameter.normal_(0, 6 * parameter.shape[-1] ** -0.5)
            elif name.endswith("_proj.weight"):  # else all of a DETR's queries look everywhere
                parameter.normal_(
                    0, 0.3 if parameter.dim() == 4 else 6 * parameter.shape[-1] ** -0.5
                )
            elif not name.startswith("backbone."):
                scale = 0.3 if name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale if parameter.dim() < 4 else 0.02)
    return model


def checkpoint(config: RunConfig, path: Path) -> torch.nn.Module:
    """Writes the model.pt of `lively(config)`."""
    model = lively(config)
    content = {"model": model.state_dict(), "config": config.to_json(), "labels": asdict(LABELS)}
    torch.save({**content, "progress": {}}, path)
    return model


def export(*arguments: object) -> int:
    return main("python -m pipeline", "", COMMANDS, ["export", *map(str, arguments)])


def pictures(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """uint8 [3, H, W] of each (H, W): large spots with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for shape in shapes:
        spots = torch.rand(1, 3, 6, 5, generator=generator)
        image = torch.nn.functional.interpolate(spots, shape, mode="bicubic")[0]
        noise = 0.1 * torch.randn(3, *shape, generator=generator)
        images.append((255 * (image + noise).clamp(0, 1)).to(torch.uint8))
    return images


def padded(images: list[Tensor], colour: int = 0) -> tuple[Tensor, Tensor]:
    """The inputs of an exported graph."""
    sides = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    batch = torch.full((len(images), 3, *sides), colour, dtype=torch.uint8)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, torch.tensor([image.shape[1:] for image in images])


def expected(model: torch.nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Detections as evaluation finds them, boxes in shares of each image."""
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    examples = [Example(image, *nothing) for image in images]
    # Of images of one pixel by one, pixels are shares.
    records = [{"id": index, "height": 1, "width": 1} for index in range(len(images))]
    with torch.no_grad():
        return predict(model, collate(examples, records), None)


def assert_same(
    found: tuple[Tensor, Tensor, Tensor], wanted: list[dict[str, Tensor]], atol: float = 1e-4
) -> None:
    """Each detection is in both, at nearly its rank: near ties may change places.

    All pairs of a query and a class are among the detections of these small models, so none can
    fall out at the end of the list.
    """
    for scores, labels, boxes, one in zip(*found, wanted, strict=True):
        torch.testing.assert_close(scores, one["scores"], atol=atol, rtol=0)
        assert one["scores"].max() - one["scores"].min() > 0.005
        assert one["boxes"].std(0).min() > 5e-4  # places differ, so they can be told apart
        far = torch.maximum(
            (boxes[:, None] - one["boxes"]).abs().amax(-1),
            (scores[:, None] - one["scores"]).abs(),
        )
        far = far.masked_fill(labels[:, None] != one["labels"], torch.inf)
        assert far.amin(0).max() <= atol
        assert far.amin(1).max() <= atol
