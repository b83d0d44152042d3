"""A data set in COCO format, drawn: small enough for a laptop, with all of COCO's hard cases."""

import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_prep.drawing import SHAPES, DrawnObject, Mask, draw_picture
from data_prep.hold import held
from data_prep.parallel import ordered_map

# Gaps between the ids, as in COCO itself, so that label mapping is exercised.
CATEGORY_IDS = dict(zip(SHAPES, (1, 2, 4, 7), strict=True))
SPLITS = ("train", "val")
FIRST_IMAGE_ID = {"train": 1, "val": 900_001}
CHUNK = 50  # pictures a task


@dataclass(frozen=True)
class _Chunk:
    folder: Path
    split: str
    seed: int
    indices: range


def synthesize(output: Path, train: int, val: int, seed: int, workers: int) -> bool:
    """Write `output/{train,val}/*.jpg` and `output/annotations/instances_{train,val}.json`.

    The files depend on `seed` and the counts alone, not on `workers`. Everything is drawn beside
    `output` and renamed when complete. Returns False if `output` already holds this very set.

    Raises:
        ValueError: a count is not positive, or `output` holds something else.
    """
    for name, count in (("train", train), ("val", val)):
        if not 0 < count < FIRST_IMAGE_ID["val"]:
            raise ValueError(f"{name} must be in 1..{FIRST_IMAGE_ID['val'] - 1}, got {count}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    output = output.absolute()
    info = {
        "description": "Textured shapes on noisy gradients, drawn by data_prep synthesize",
        "version": "1",
        "contents": {"seed": seed, "train": train, "val": val},
    }
    if not _is_free(output, info):
        return False
    state = output.with_name(f".{output.name}.partial")
    with held(state, wait=True):
        drawn = _is_free(output, info)  # else by who was waited for
        if drawn:
            shutil.rmtree(state / "set", ignore_errors=True)  # of a killed process
            _draw(state / "set", info, workers)
            os.replace(state / "set", output)
    # Network file systems keep a folder in which a file is open, as the lock was.
    shutil.rmtree(state, ignore_errors=True)
    return drawn


def _is_free(output: Path, info: dict[str, Any]) -> bool:
    """Whether there is nothing; False where it is this very set."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return True
    if _info(output) == info:
        return False
    raise ValueError(f"{output} already holds something else; choose another --output or remove it")


def _draw(folder: Path, info: dict[str, Any], workers: int) -> None:
    counts = {split: info["contents"][split] for split in SPLITS}
    (folder / "annotations").mkdir(parents=True)
    chunks = []
    for split, count in counts.items():
        (folder / split).mkdir()
        chunks += [
            _Chunk(folder / split, split, info["contents"]["seed"], range(i, min(i + CHUNK, count)))
            for i in range(0, count, CHUNK)
        ]
    images: dict[str, list[Any]] = {split: [] for split in SPLITS}
    annotations: dict[str, list[Any]] = {split: [] for split in SPLITS}
    with tqdm(total=sum(counts.values()), desc="draw", unit="image", disable=None) as bar:
        results = ordered_map(_draw_chunk, chunks, min(workers, len(chunks)))
        for chunk, result in zip(chunks, results, strict=True):
            for image, drawn in result:
                images[chunk.split].append(image)
                for annotation in drawn:
                    identity = {"id": len(annotations[chunk.split]) + 1, "image_id": image["id"]}
                    annotations[chunk.split].append(identity | annotation)
            bar.update(len(result))
    for split in SPLITS:
        content = {
            "info": info,
            "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org"}],
            "images": images[split],
            "annotations": annotations[split],
            "categories": [
                {"supercategory": "shape", "id": number, "name": shape}
                for shape, number in CATEGORY_IDS.items()
            ],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _info(output: Path) -> Any:
    try:
        return json.loads((output / "annotations" / "instances_val.json").read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _draw_chunk(chunk: _Chunk) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    result = []
    for index in chunk.indices:
        rng = np.random.default_rng([chunk.seed, SPLITS.index(chunk.split), index])
        picture = draw_picture(rng)
        encoded = io.BytesIO()
        Image.fromarray(picture.pixels).save(encoded, "JPEG", quality=90)
        number = FIRST_IMAGE_ID[chunk.split] + index
        name = f"{number:012d}.jpg"
        (chunk.folder / name).write_bytes(encoded.getvalue())
        height, width = picture.pixels.shape[:2]
        image = {"license": 1, "file_name": name, "height": height, "width": width, "id": number}
        annotations = [_annotate_object(drawn) for drawn in picture.objects]
        if picture.crowd is not None:
            annotations.append(_annotate_crowd(picture.crowd.shape, picture.crowd.mask))
        result.append((image, annotations))
    return result


def _annotate_object(drawn: DrawnObject) -> dict[str, Any]:
    """Box and area are those of the polygon, so the three agree to rounding."""
    polygon = np.round(drawn.polygon.astype(np.float64), 2)
    corner, size = polygon.min(0), np.ptp(polygon, axis=0)
    x, y = polygon.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        "category_id": CATEGORY_IDS[drawn.shape],
        "bbox": [round(float(v), 2) for v in (*corner, *size)],
        "area": round(float(area), 3),
        "iscrowd": 0,
        "segmentation": [[float(v) for v in polygon.ravel()]],
    }


def _annotate_crowd(shape: str, mask: Mask) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    width, height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
    return {
        "category_id": CATEGORY_IDS[shape],
        "bbox": [int(columns[0]), int(rows[0]), width, height],
        "area": int(mask.sum()),
        "iscrowd": 1,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run-length code of a mask [H, W]: column-major, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate(([0], changes, [flat.size]))
    runs = [int(run) for run in np.diff(edges)]
    return [0, *runs] if flat[0] else runs
