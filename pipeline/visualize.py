"""Predictions drawn beside the ground truth."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

from model.postprocess import postprocess
from pipeline.config import RunConfig
from pipeline.data.augment import resize_for_evaluation
from pipeline.data.batch import collate, decode
from pipeline.data.images import decode_image
from pipeline.data.labels import Labels
from pipeline.data.objects import objects
from pipeline.data.shards import Sample, ShardSet
from pipeline.drawing import Label, draw_labels, font_of, save

TILE = 360  # pixels, longest side of one drawn image


def draw_predictions(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    path: Path,
    count: int = 6,
    threshold: float = 0.3,
) -> None:
    """`draw_images` of `count` images, spread over the set."""
    count = min(count, len(shards))
    indices = [i * len(shards) // count for i in range(count)]
    draw_images(model, shards, labels, config, device, path, indices, threshold)


@torch.no_grad()
def draw_images(
    model: nn.Module,
    shards: ShardSet,
    labels: Labels,
    config: RunConfig,
    device: torch.device,
    path: Path,
    indices: Sequence[int],
    threshold: float,
) -> None:
    """Saves one picture of the images at `indices`: on the left of each pair the ground truth, on
    the right the predictions that score `threshold` or more."""
    model.eval()
    tiles = []
    for index in indices:
        sample = shards.read(index)
        example = resize_for_evaluation(decode(sample, labels.column_of()), config.augment)
        batch = collate([example], [sample.image]).to(device)
        outputs = model(batch.normalized_images(), batch.padding_mask)
        result = postprocess(outputs, batch.sizes.to(device))[0]
        kept = result["scores"] >= threshold
        predicted = [
            Label(box, label, f"{labels.names[label]} {score:.2f}")
            for box, label, score in zip(
                result["boxes"][kept].tolist(),
                result["labels"][kept].tolist(),
                result["scores"][kept].tolist(),
                strict=True,
            )
        ]
        tiles.append(_draw(sample, _truth(sample, labels), "ground truth"))
        title = f"score >= {threshold:g}" if predicted else f"none scores {threshold:g}"
        tiles.append(_draw(sample, predicted, title))
    save(_sheet(tiles, columns=4 if len(indices) > 1 else 2), path)


def _truth(sample: Sample, labels: Labels) -> list[Label]:
    column_of = labels.column_of()
    drawn = []
    for annotation in objects(sample.annotations, column_of):
        x, y, w, h = annotation["bbox"]
        column = column_of[int(annotation["category_id"])]
        name = labels.names[column] + (" (crowd)" if annotation.get("iscrowd") else "")
        drawn.append(Label((x, y, x + w, y + h), column, name))
    return drawn


def _draw(sample: Sample, labels: list[Label], title: str) -> Image.Image:
    image = Image.fromarray(decode_image(sample.image_bytes)[0].permute(1, 2, 0).numpy())
    scale = TILE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    draw_labels(image, [label.scaled(scale) for label in labels])
    tile = Image.new("RGB", (TILE, TILE + 20), "white")
    tile.paste(image, (0, 20))
    name = f"{title}: {sample.image.get('file_name')}"
    ImageDraw.Draw(tile).text((4, 2), name, fill="black", font=font_of(12))
    return tile


def _sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    gap = 8
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet
