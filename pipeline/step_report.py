"""What `benchmark-step` says: the loader's speed, the table, the JSON."""

import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
import torch
import torchvision

from pipeline.benchmark_step import MEAN_BOXES, MOST_BOXES, Measured, benchmark_step
from pipeline.config import RunConfig
from pipeline.contenders import require
from pipeline.data.labels import build_labels
from pipeline.data.loader import training_steps
from pipeline.data.shards import ShardSet
from pipeline.dataset import open_shards
from pipeline.engine import choose_device, stop_process_group
from pipeline.errors import UserError
from pipeline.step_timing import PHASES, Workload

ROOT = Path(__file__).resolve().parents[1]
LOADER_SECONDS = 10.0


def run(
    config: RunConfig,
    names: list[str],
    size: tuple[int, int],
    batch_sizes: tuple[int, ...],
    precisions: tuple[Literal["fp32", "bf16"], ...],
    steps: int,
    device_name: Literal["auto", "cpu", "cuda"],
    data: str,
    workers: int,
    output: Path | None,
) -> None:
    """Measures, prints a table for each workload and keeps `output` up to date.

    Raises `UserError` for what cannot be measured.
    """
    for option, value in (("size", min(size)), ("batch-sizes", min(batch_sizes, default=0))):
        if value < 1:
            raise UserError(f"--{option}: got {value}, expected 1 or more")
    if steps < 1 or workers < 0:
        raise UserError(f"--steps {steps}, --workers {workers}: expected at least 1 and 0")
    if len({name.partition("=")[0] for name in names}) < len(names):
        raise UserError(f"--beside: got {' '.join(names[1:])}, expected each once, without ours")
    if device_name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu")
    for name in names:
        require(name, config)
    engine = replace(config.engine, device=device_name, precision="fp32", loader_workers=workers)
    config = replace(config, engine=engine)
    device = choose_device(engine)
    shards = open_shards(data, config.data) if data else None
    report: dict[str, Any] = {**surroundings(config, device, size), "workloads": []}
    for work, found in benchmark_step(config, names, size, batch_sizes, precisions, steps, device):
        loader = None
        if shards is not None:
            loader = loader_speed(config, shards, size, work.batch_size, device.type == "cuda")
        rows = [row(result, found[0], work.batch_size) for result in found]
        print(f"{table(work, rows, loader)}\n", flush=True)
        facts = {"batch_size": work.batch_size, "precision": work.precision}
        boxes = [len(target["labels"]) for batch in work.batches for target in batch.targets]
        facts["boxes"] = {"mean": statistics.mean(boxes), "low": min(boxes), "high": max(boxes)}
        if loader is not None:
            facts["loader"] = {"images_per_second": loader, "workers": workers}
        report["workloads"].append({**facts, "contenders": rows})
        if output is not None:
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    stop_process_group()
    if output is not None:
        print(f"written: {output}")


def loader_speed(
    config: RunConfig, shards: ShardSet, size: tuple[int, int], batch_size: int, cuda: bool
) -> float:
    """Images per second that training's loader delivers, resized to `size` (short and long side).

    Counted while its queue is full: neither the first nor the last batches of the epoch. Raises
    `UserError` where the shards are too few for that.
    """
    short, long = sorted(size)
    config = replace(
        config,
        augment=replace(config.augment, short_sides=(short,), max_side=long),
        optimizer=replace(config.optimizer, batch_size=batch_size),
        engine=replace(config.engine, micro_batch=0),
    )
    queue = 2 * config.engine.loader_workers  # the DataLoader's own prefetching
    epoch = len(shards) // batch_size
    counted = epoch - 2 * queue - 1
    if counted < 1:
        raise UserError(
            f"--data {shards.folder}: got {len(shards)} images, expected "
            f"{(2 * queue + 2) * batch_size} or more for batches of {batch_size} and "
            f"{config.engine.loader_workers} workers"
        )
    labels = build_labels(shards.categories, config.data.labels)
    steps = training_steps(shards, labels, config, range(epoch), 0, 1, pin_memory=cuda)
    for _ in range(queue + 1):
        next(steps)
    done, start = 0, time.perf_counter()
    while done < counted and time.perf_counter() - start < LOADER_SECONDS:
        next(steps)
        done += 1
    return done * batch_size / (time.perf_counter() - start)


def row(result: Measured, ours: Measured, batch_size: int) -> dict[str, Any]:
    """One contender's figures for the JSON: milliseconds, MiB; medians with lowest and highest."""
    facts = asdict(result)
    rounds, host, on_device = (facts.pop(name) for name in ("rounds", "host", "on_device"))
    losses = facts.pop("losses")
    facts["contender"] = result.contender.partition("=")[0]  # no path of this machine
    if result.failed:
        return {name: facts[name] for name in ("contender", "what", "failed")}
    step = statistics.median(rounds)
    facts |= {
        "last_loss": losses[-1],
        "steps": len(losses),
        "step": _spread(rounds),
        "images_per_second": 1000 * batch_size / step,
        "host": {p: _spread([s[p] for s in host]) for p in PHASES},
        "on_device": {p: _spread([s[p] for s in on_device]) for p in PHASES} if on_device else None,
    }
    if not ours.failed:
        pairs = zip(rounds, ours.rounds, strict=True)
        facts["step_over_ours"] = _spread([theirs / mine for theirs, mine in pairs])
    if result.device_busy is not None:
        facts["device_busy_share"] = result.device_busy / step
    return facts


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(work: Workload, rows: list[dict[str, Any]], loader: float | None) -> str:
    """The rows of one workload as text, phases by the device's time where there is a GPU."""
    height, width = work.size
    clock = "the GPU's stream" if work.device.type == "cuda" else "the host's clock"
    lines = [
        f"{height}x{width}, batch {work.batch_size}, {work.precision}; milliseconds by {clock}",
        f"{'contender':<13}{'step (low-high)':>24}{'images/s':>10}{'x ours':>8}"
        + "".join(f"{phase:>11}" for phase in PHASES)
        + f"{'peak MiB':>10}{'GPU busy':>10}",
    ]
    for facts in rows:
        name = facts["contender"]
        if facts["failed"]:
            lines.append(f"{name:<13}{facts['failed']}")
            continue
        step, phases = facts["step"], facts["on_device"] or facts["host"]
        over = facts.get("step_over_ours", {}).get("median")
        busy = facts.get("device_busy_share")
        lines.append(
            f"{name:<13}"
            f"{'{median:.1f} ({low:.1f}-{high:.1f})'.format(**step):>24}"
            f"{facts['images_per_second']:>10.2f}"
            f"{'-' if over is None else f'{over:.2f}':>8}"
            + "".join(f"{phases[phase]['median']:>11.1f}" for phase in PHASES)
            + f"{facts['peak_memory']:>10.0f}{'-' if busy is None else f'{busy:.0%}':>10}"
        )
    for facts in rows:
        if facts.get("matcher"):
            times = facts["matcher"]
            lines.append(
                f"matcher, of the loss: {times['total']:.1f} ms on the host: costs "
                f"{times['costs']:.1f}, waiting for them {times['wait']:.1f}, assigning "
                f"{times['assign']:.1f}"
            )
        if facts.get("syncs"):
            waits = ", ".join(f"{phase} {count}" for phase, count in facts["syncs"].items())
            lines.append(f"{facts['contender']} waits for the GPU, times a step: {waits}")
    if loader is not None:
        lines.append(f"loader: {loader:.1f} images/s")
    return "\n".join(lines)


def surroundings(config: RunConfig, device: torch.device, size: tuple[int, int]) -> dict[str, Any]:
    """What the figures depend on beside the contenders."""
    cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {m.__name__: m.__version__ for m in (torchvision, np, scipy)}
    if cuda:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "recipe": config.recipe,
        "model": asdict(config.model),
        "optimizer": asdict(config.optimizer),
        "size": size,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "device_memory": torch.cuda.get_device_properties(device).total_memory / 2**20
        if cuda
        else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        },
        "commit": commit(),
        "images": "uint8 noise without padding",
        "boxes": f"geometric of mean {MEAN_BOXES} an image, at most {MOST_BOXES}",
        "units": "milliseconds, MiB; medians over steps, of `step` over rounds",
    }


def processor() -> str:
    """The name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The checkout's commit, with "-dirty" where sources differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
