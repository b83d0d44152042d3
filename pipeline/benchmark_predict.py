"""Times prediction, from a batch of pixels to detections, beside other implementations."""

import importlib
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export_graph import smallest_side
from pipeline.predict import Detector
from pipeline.predict_contenders import Contender, build_contender, detector_of, require
from pipeline.step_report import surroundings

BATCHES = 4
"""Different batches that are taken in turn."""


def run(
    target: str,
    beside: tuple[str, ...],
    size: tuple[int, int],
    batch_sizes: tuple[int, ...],
    repeats: int,
    precision: Literal["fp32", "bf16"],
    device: Literal["auto", "cpu", "cuda"],
    output: Path | None,
) -> None:
    """Measures, prints a table for each batch size, and keeps the JSON file `output` up to date.

    Raises `UserError` for what cannot be measured.
    """
    if min(batch_sizes, default=0) < 1 or repeats < 1:
        raise UserError(
            f"--batch-sizes {' '.join(map(str, batch_sizes))}, --repeats {repeats}: expected 1 or "
            "more"
        )
    if len({"ours", *beside}) <= len(beside):
        raise UserError(f"--beside: got {' '.join(beside)}, expected each once, without ours")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: folder {str(output.parent)!r} does not exist")
    detector = detector_of(target, device, precision)
    least = smallest_side(detector.config.model)
    if min(size) < least:
        raise UserError(f"--size: got {size[0]} {size[1]}, expected sides of {least} or more")
    for name in beside:
        require(name, detector)
    contenders = [build_contender(name, detector) for name in ("ours", *beside)]
    report = {**_facts(detector, size, beside), "precision": precision, "workloads": []}
    for batch_size in batch_sizes:
        rows = measure(contenders, detector, size, batch_size, repeats)
        print(f"{table(rows, size, batch_size, precision)}\n", flush=True)
        report["workloads"].append({"batch_size": batch_size, "contenders": rows})
        if output is not None:
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if output is not None:
        print(f"written: {output}")


def measure(
    contenders: list[Contender],
    detector: Detector,
    size: tuple[int, int],
    batch_size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Each contender's latencies in milliseconds, all of them in turn on the same images.

    The first is what the others are compared with.
    """
    batches = _batches(size, batch_size, detector.config.seed)
    first = [contender.detect(*batches[0]) for contender in contenders]  # untimed: it warms up
    times: list[list[float]] = [[] for _ in contenders]
    for repeat in range(repeats):
        for turn in range(len(contenders)):
            index = (repeat + turn) % len(contenders)
            times[index].append(
                _latency(contenders[index], batches[repeat % BATCHES], detector.device)
            )
    return [
        {
            "contender": contender.name,
            "what": contender.what,
            "latency": _spread(own),
            "images_per_second": 1000 * batch_size / statistics.median(own),
            "times_ours": _spread([a / b for a, b in zip(own, times[0], strict=True)]),
            "score_difference": max(
                (a.float() - b.float()).abs().max().item()
                for a, b in zip(scores, first[0], strict=True)
            ),
            "repeats": repeats,
        }
        for contender, own, scores in zip(contenders, times, first, strict=True)
    ]


def _batches(size: tuple[int, int], batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noise, uint8 [N, 3, H, W] in channels-last order as images are decoded, and its sizes."""
    random = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, *size)
    sizes = torch.tensor([size] * batch_size)
    return [
        (
            torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).contiguous(
                memory_format=torch.channels_last
            ),
            sizes,
        )
        for _ in range(BATCHES)
    ]


def _latency(contender: Contender, batch: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Milliseconds from pixels on the host to all detections."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    contender.detect(*batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(values),
        "p90": ordered[-(-9 * len(ordered) // 10) - 1],
        "low": ordered[0],
        "high": ordered[-1],
    }


def _facts(detector: Detector, size: tuple[int, int], beside: tuple[str, ...]) -> dict[str, Any]:
    """What the figures depend on."""
    facts = surroundings(detector.config, detector.device, size)
    for name in ("optimizer", "boxes"):
        del facts[name]
    modules = {"transformers": "transformers", "onnx": "onnxruntime"}
    for name in beside:
        if name in modules:
            facts["versions"][modules[name]] = importlib.import_module(modules[name]).__version__
    facts["units"] = "milliseconds a batch; times_ours: of the same turn; p90: nearest rank"
    return facts


def table(
    rows: list[dict[str, Any]], size: tuple[int, int], batch_size: int, precision: str
) -> str:
    """One workload's rows, which `measure` gives, as text. size: (height, width) in pixels."""
    lines = [
        f"{size[0]}x{size[1]}, batch {batch_size}, {precision}; milliseconds a batch, "
        f"{rows[0]['repeats']} repeats in turn",
        f"{'contender':<13}{'median':>9}{'p90':>9}{'images/s':>10}{'times ours (low-high)':>24}"
        f"{'scores differ':>15}",
    ]
    for row in rows:
        latency, over = row["latency"], row["times_ours"]
        spread = f"{over['median']:.2f} ({over['low']:.2f}-{over['high']:.2f})"
        lines.append(
            f"{row['contender']:<13}{latency['median']:>9.1f}{latency['p90']:>9.1f}"
            f"{row['images_per_second']:>10.2f}{spread:>24}{row['score_difference']:>15.1e}"
        )
    return "\n".join(lines)
