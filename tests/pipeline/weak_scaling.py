"""How does a step's time grow with the number of processes, each with its own core and images?

    python -m tests.pipeline.weak_scaling TRAIN VAL --recipe deformable_detr_r50

runs short trainings by torchrun with 1, 2, 3 and 4 processes in turn, on one core each, the global
batch growing with them, over gloo on loopback. Loading is left out: it has processes of its own.
Prints seconds a step, images/s, and images/s per process against one process alone.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3  # steps of each training that do not count


@dataclass(frozen=True)
class Options:
    train: tyro.conf.Positional[str]
    """Shard folder to train on."""
    val: tyro.conf.Positional[str]
    recipe: str = "deformable_detr_r50"
    side: int = 256
    """Shorter side of the images, in pixels."""
    images: int = 2
    """For each process and step."""
    steps: int = 8
    rounds: int = 3
    most: int = 4
    """Processes."""
    zero_stage: int = 1


def seconds_a_step(options: Options, processes: int, folder: Path) -> float:
    """Median over the steps of one training, data wait taken off; it is stopped after them."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    command = [
        "taskset", "-c", ",".join(map(str, cores)),
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "pipeline", "train",
        options.recipe, "--output", str(folder), "--data.train", options.train,
        "--data.val", options.val, "--optimizer.batch-size", str(options.images * processes),
        "--engine.log-every", "1", "--engine.loader-workers", "0", "--engine.device", "cpu",
        "--engine.zero-stage", str(options.zero_stage),
        "--augment.short-sides", str(options.side), "--augment.max-side", str(2 * options.side),
        "--augment.crop-probability", "0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines: list[dict] = []
    while len(lines) < WARM_UP + options.steps and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [x for x in read_lines(path) if x["kind"] == "train"]
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    process.terminate()
    process.wait()
    assert len(lines) >= WARM_UP + options.steps, f"{processes} processes ended early"
    batch = options.images * processes
    times = [batch / x["images_per_second"] - x["data_wait"] for x in lines[WARM_UP:]]
    return statistics.median(times[: options.steps])


def main(options: Options) -> None:
    counts = range(1, options.most + 1)
    found: dict[int, list[float]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for count in counts:
                run = Path(folder) / f"{number}-{count}"
                found[count].append(seconds_a_step(options, count, run))
                print(
                    f"round {number + 1}: {count} processes: {found[count][-1]:.3f} s", flush=True
                )
    print("| processes | s/step | images/s | efficiency |\n|---|---|---|---|")
    for count in counts:
        seconds = statistics.median(found[count])
        ratios = [one / more for one, more in zip(found[1], found[count], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {count} | {seconds:.2f} | {options.images * count / seconds:.2f} | {spread} |")


if __name__ == "__main__":
    main(tyro.cli(Options))
