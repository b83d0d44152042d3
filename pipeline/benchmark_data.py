"""How fast one core turns encoded images into batches, beside the way of the official code."""

import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from PIL import Image
from torch import Tensor

from pipeline import pillow_loader
from pipeline.config import AugmentConfig
from pipeline.data.augment import Geometry, choose, transform
from pipeline.data.batch import Batch, collate, decode
from pipeline.data.labels import build_labels
from pipeline.data.order import random_stream
from pipeline.data.shards import Sample, ShardSet
from pipeline.errors import UserError
from pipeline.step_report import commit, processor

ROUNDS = 7
STAGES = ("decode", "augment", "collate", "normalize")


@dataclass(frozen=True)
class Work:
    """One image, and what is done with it: the same for both ways."""

    sample: Sample
    geometry: Geometry
    boxes: Tensor
    """float32 [n, 4] absolute (x0, y0, x1, y1), which the official way is given ready-made."""


def run(
    data: str, images: int, batch_size: int, size: tuple[int, int], output: Path | None
) -> None:
    """Measures in turn, prints a table, and writes `output` as JSON.

    data: a shard folder; empty: pictures of `size` (height, width) are drawn. Raises `UserError`
    for numbers that cannot be.
    """
    if min(images, batch_size, *size) < 1:
        raise UserError(
            f"--images {images}, --batch-size {batch_size}, --size {size}: expected 1 or more"
        )
    torch.set_num_threads(1)
    if data:
        shards = ShardSet(data)
        column_of = build_labels(shards.categories, "contiguous").column_of()
        spread = np.linspace(0, len(shards) - 1, min(images, len(shards))).astype(int)
        samples = [shards.read(int(index)) for index in spread]
    else:
        column_of, samples = {1: 0}, [drawn(i, *size) for i in range(images)]
    work = prepare(samples, column_of)
    ways: dict[str, Callable[[list[Work]], dict[str, float]]] = {
        "ours": lambda batch: ours(batch, column_of),
        "official": official,
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for i in range(ROUNDS + 1):
        for name, way in ways.items():
            taken = milliseconds(way, work, batch_size)
            if i:  # in the first round caches are cold
                rounds[name].append(taken)
    report = {
        "data": "shards" if data else f"drawn, {size[1]}x{size[0]}",
        "images": len(work),
        "mean_kilobytes": statistics.mean(len(w.sample.image_bytes) for w in work) / 1000,
        "batch_size": batch_size,
        "rounds": ROUNDS,
        "units": "milliseconds an image on one core; medians of rounds, with lowest and highest",
        "ways": {name: summary(rounds[name]) for name in ways},
        "speedup": speedup(rounds["ours"], rounds["official"], normalize=False),
        "speedup_normalized_on_host": speedup(rounds["ours"], rounds["official"], normalize=True),
        "agreement": agreement(work, column_of),
        "processor": processor(),
        "versions": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            **{m.__name__: m.__version__ for m in (torch, torchvision, simplejpeg, np)},
        },
        "commit": commit(),
    }
    print(table(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written: {output}")


def prepare(samples: list[Sample], column_of: dict[int, int]) -> list[Work]:
    """Random choices of the paper's augmentation, which are then the same in every round."""
    work = []
    for i, sample in enumerate(samples):
        example = decode(sample, column_of)
        height, width = example.image.shape[-2:]
        geometry = choose((height, width), AugmentConfig(), random_stream(0, 0, i))
        work.append(Work(sample, geometry, example.boxes))
    return work


def milliseconds(
    way: Callable[[list[Work]], dict[str, float]], work: list[Work], batch_size: int
) -> dict[str, float]:
    """An image's share of each stage."""
    total = dict.fromkeys(STAGES, 0.0)
    for start in range(0, len(work), batch_size):
        for stage, seconds in way(work[start : start + batch_size]).items():
            total[stage] += 1000 * seconds / len(work)
    return total


def ours(batch: list[Work], column_of: dict[int, int]) -> dict[str, float]:
    """Seconds of each stage. In training on a GPU `normalize` is the GPU's work."""
    times = [time.perf_counter()]
    examples = [decode(w.sample, column_of, w.geometry) for w in batch]
    times.append(time.perf_counter())
    examples = [transform(e, w.geometry) for e, w in zip(examples, batch, strict=True)]
    times.append(time.perf_counter())
    made: Batch = collate(examples, [w.sample.image for w in batch])
    times.append(time.perf_counter())
    made.normalized_images()
    times.append(time.perf_counter())
    return dict(zip(STAGES, np.diff(times).tolist(), strict=True))


def official(batch: list[Work]) -> dict[str, float]:
    """Seconds of each stage of `pipeline.pillow_loader`, which normalises before it collates."""
    times = [time.perf_counter()]
    images = [pillow_loader.decode(w.sample.image_bytes) for w in batch]
    times.append(time.perf_counter())
    pairs = [
        pillow_loader.augment(image, w.boxes, w.geometry)
        for image, w in zip(images, batch, strict=True)
    ]
    times.append(time.perf_counter())
    tensors = [pillow_loader.normalize(image, boxes) for image, boxes in pairs]
    times.append(time.perf_counter())
    pillow_loader.collate([pixels for pixels, _ in tensors])
    times.append(time.perf_counter())
    decoding, augmenting, normalizing, collating = np.diff(times).tolist()
    return dict(zip(STAGES, (decoding, augmenting, collating, normalizing), strict=True))


def agreement(work: list[Work], column_of: dict[int, int]) -> dict[str, float]:
    """How far the two ways are apart: mean and largest difference of a pixel's channel of 255, the
    largest mean of an image, and the number of images whose boxes are not equal."""
    means, largest, other_boxes = [], 0, 0
    for w in work:
        example = transform(decode(w.sample, column_of, w.geometry), w.geometry)
        image, boxes = pillow_loader.augment(
            pillow_loader.decode(w.sample.image_bytes), w.boxes, w.geometry
        )
        theirs = np.asarray(image, dtype=np.int16)
        difference = np.abs(example.image.permute(1, 2, 0).numpy() - theirs)
        means.append(float(difference.mean()))
        largest = max(largest, int(difference.max()))
        other_boxes += not torch.equal(example.boxes, boxes)
    return {
        "mean": statistics.mean(means),
        "largest_mean": max(means),
        "largest": largest,
        "images_with_other_boxes": other_boxes,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the stages and spreads of their sums, in milliseconds an image, over rounds."""
    totals = [sum(r.values()) for r in rounds]
    on_host = [sum(r.values()) - r["normalize"] for r in rounds]
    return {
        "stages": {s: statistics.median(r[s] for r in rounds) for s in STAGES},
        "total": spread(totals),
        "without_normalize": spread(on_host),
        "images_per_second": 1000 / statistics.median(totals),
        "images_per_second_without_normalize": 1000 / statistics.median(on_host),
    }


def speedup(
    ours: list[dict[str, float]], official: list[dict[str, float]], normalize: bool
) -> dict[str, float]:
    """Round by round. normalize: ours does it on the host, too, as the official way always does."""
    return spread(
        [
            sum(theirs.values()) / (sum(mine.values()) - (not normalize) * mine["normalize"])
            for mine, theirs in zip(ours, official, strict=True)
        ]
    )


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(report: dict[str, Any]) -> str:
    """The report of `run` as lines for a terminal."""
    lines = [
        f"{report['images']} images ({report['data']}; {report['mean_kilobytes']:.0f} kB each), "
        f"batches of {report['batch_size']}; milliseconds an image on one core",
        f"{'way':<10}" + "".join(f"{s:>11}" for s in STAGES) + f"{'total':>9}{'images/s':>10}",
    ]
    for name, way in report["ways"].items():
        lines.append(
            f"{name:<10}"
            + "".join(f"{way['stages'][s]:>11.2f}" for s in STAGES)
            + f"{way['total']['median']:>9.2f}{way['images_per_second']:>10.1f}"
        )
    faster, both = report["speedup"], report["speedup_normalized_on_host"]
    mine = report["ways"]["ours"]["images_per_second_without_normalize"]
    same = report["agreement"]
    return "\n".join(
        [
            *lines,
            "normalised on the device, as in training: ours {:.1f} images/s, {median:.2f} times "
            "the official way ({low:.2f}-{high:.2f})".format(mine, **faster),
            "normalised on the host: {median:.2f} times ({low:.2f}-{high:.2f})".format(**both),
            f"pixels differ by {same['mean']:.3f} of 255 on average, by {same['largest_mean']:.3f} "
            f"in the image where most; boxes differ in {same['images_with_other_boxes']} images",
        ]
    )


def drawn(seed: int, height: int, width: int) -> Sample:
    """A picture with the spectrum of photographs (amplitude falls with frequency), as a JPEG file
    of about a photograph's size, with seven boxes."""
    random = random_stream(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # the mean is set below

    def layer(exponent: float) -> np.ndarray:
        noise = np.fft.rfft2(random.standard_normal((height, width))) / frequency**exponent
        values = np.fft.irfft2(noise, (height, width))
        return values / values.std()

    light = layer(1.0)
    channels = [128 + 50 * (0.85 * light + 0.35 * layer(1.3)) for _ in range(3)]
    file = io.BytesIO()
    pixels = np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    corners = random.uniform(0, 0.7, (7, 2)) * (width, height)
    sides = random.uniform(0.05, 0.3, (7, 2)) * (width, height)
    boxes = np.concatenate([corners, sides], axis=1).round(2).tolist()
    return Sample(
        file.getvalue(),
        {"id": seed, "file_name": f"{seed}.jpg", "height": height, "width": width},
        [{"bbox": box, "category_id": 1, "iscrowd": 0} for box in boxes],
    )
