"""Predictions drawn beside the ground truth."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from model.postprocess import postprocess
from pipeline.config import RunConfig
from pipeline.data.augment import resize_for_evaluation
from pipeline.data.batch import collate, decode
from pipeline.data.labels import Labels
from pipeline.data.objects import objects
from pipeline.data.shards import Sample, ShardSet

# Colours that stay apart for people who see few of them (Okabe and Ito's palette).
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
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
            (box, int(label), f"{labels.names[int(label)]} {score:.2f}")
            for box, label, score in zip(
                result["boxes"][kept].tolist(),
                result["labels"][kept].tolist(),
                result["scores"][kept].tolist(),
                strict=True,
            )
        ]
        tiles.append(_draw(sample, _truth(sample, labels), "ground truth"))
        title = f"score >= {threshold:g}" if predicted else f"none scores {threshold:g}"
        tiles.append(_draw(sample, predicted[::-1], title))  # the best drawn last
    _sheet(tiles, columns=4 if len(indices) > 1 else 2).save(path)


def _truth(sample: Sample, labels: Labels) -> list[tuple[list[float], int, str]]:
    column_of = labels.column_of()
    drawn = []
    for annotation in objects(sample.annotations, column_of):
        x, y, w, h = annotation["bbox"]
        column = column_of[int(annotation["category_id"])]
        name = labels.names[column] + (" (crowd)" if annotation.get("iscrowd") else "")
        drawn.append(([x, y, x + w, y + h], column, name))
    return drawn


def _draw(sample: Sample, boxes: list[tuple[list[float], int, str]], title: str) -> Image.Image:
    image = Image.open(io.BytesIO(sample.image_bytes)).convert("RGB")
    scale = TILE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    pen = ImageDraw.Draw(image)
    # Pillow's own font has no letters beyond ASCII.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 12)
    for box, column, _ in boxes:
        x0, y0, x1, y1 = (v * scale for v in box)
        pen.rectangle(
            [x0, y0, max(x0, x1), max(y0, y1)], outline=COLOURS[column % len(COLOURS)], width=2
        )
    for box, column, text in boxes:  # over all lines, to be read
        x0, y0 = box[0] * scale, box[1] * scale
        at = (min(max(0, x0), image.width - pen.textlength(text, font) - 3), max(0, y0 - 15))
        left, top, right, bottom = pen.textbbox(at, text, font=font)
        pen.rectangle([left, top, right + 2, bottom + 1], fill=COLOURS[column % len(COLOURS)])
        pen.text(at, text, fill="black", font=font)
    tile = Image.new("RGB", (TILE, TILE + 20), "white")
    tile.paste(image, (0, 20))
    name = f"{title}: {sample.image.get('file_name')}"
    ImageDraw.Draw(tile).text((4, 2), name, fill="black", font=font)
    return tile


def _sheet(tiles: list[Image.Image], columns: int) -> Image.Image:
    gap = 8
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet
