"""The training loop: from a `RunConfig` and a run folder to a trained, evaluated detector.

Starting a run whose folder exists resumes it. Nothing here knows who launched it.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.criterion import build_criterion
from model.detr import build_model
from model.weights import load_backbone, load_official
from pipeline import checkpoint
from pipeline.checkpoint import Progress
from pipeline.config import RunConfig
from pipeline.data.labels import Labels, build_labels
from pipeline.data.loader import steps_per_epoch, training_steps
from pipeline.data.shards import ShardSet
from pipeline.engine import (
    average_batch_norm,
    build_engine,
    choose_device,
    seed_step,
    start_process_group,
)
from pipeline.errors import UserError
from pipeline.evaluate import Evaluation, detect, gather, ground_truth, summarize
from pipeline.tracking import MetricsLog
from pipeline.visualize import draw_predictions


@dataclass(frozen=True)
class Dataset:
    """The two shard folders of a run and their common class columns."""

    train: ShardSet
    val: ShardSet
    labels: Labels


def open_dataset(config: RunConfig) -> Dataset:
    """Raises `UserError` where a folder is missing or the two disagree about categories."""
    if not config.data.train or not config.data.val:
        raise UserError(
            "data.train and data.val: expected two shard folders; "
            "give --data.train DIR --data.val DIR"
        )
    train, val = ShardSet(config.data.train), ShardSet(config.data.val)
    labels = build_labels(train.categories, config.data.labels)
    if build_labels(val.categories, config.data.labels) != labels:
        raise UserError(
            f"{val.folder} and {train.folder} have different categories; "
            f"convert both from annotation files with the same list"
        )
    return Dataset(train, val, labels)


def train(config: RunConfig, folder: Path) -> Path:
    """Trains to the end of the schedule and returns the best checkpoint's folder (collective).

    The run's identity is checked against `folder/config.json`; the newest intact checkpoint there
    is continued. Rank 0 writes `metrics.jsonl`, `evaluations/`, `best.json` and, at the end,
    `predictions.png`. Raises `UserError` for a mistake in the config, and `FloatingPointError` with
    the step when the loss is not finite.
    """
    device = choose_device(config.engine)
    dataset = open_dataset(config)
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    rank, world = start_process_group(device)
    main = rank == 0
    torch.use_deterministic_algorithms(config.engine.deterministic)
    epoch_steps = steps_per_epoch(dataset.train, config.optimizer.batch_size)
    if main:
        claim(folder, config, dataset)
    dist.barrier()

    engine, criterion = build(config, epoch_steps, device)
    log = MetricsLog(folder)

    said: list[str] = []  # written once the log is rewound

    # The order of starts: the run's own checkpoint, then given weights (in `build`), then scratch.
    progress = checkpoint.resume(engine, folder, said.append) or Progress()
    if progress.step:
        said.append(f"resumed after step {progress.step}, in epoch {progress.epoch + 1}")
    elif not config.init.backbone and not config.init.weights and config.model.backbone != "tiny":
        said.append(
            f"{config.model.backbone} starts from random weights: --init.backbone FILE "
            f"gives it ImageNet's, which the published AP needs"
        )
    if main:
        log.rewind(progress.step)
        position = progress.step, progress.step / epoch_steps
        log.write(
            "event",
            *position,
            event="start",
            world=world,
            steps=config.schedule.epochs * epoch_steps,
            epochs=config.schedule.epochs,
        )
        for message in said:
            log.write("event", *position, event="message", text=message)
        publish_best(folder, progress)  # a crash may have come between checkpoint and best.json
    truth = ground_truth(dataset.val) if main else None
    for epoch in range(progress.epoch, config.schedule.epochs):
        progress = train_epoch(engine, criterion, dataset, config, progress, folder, log, device)
        average_batch_norm(engine.module)
        evaluation = evaluate_epoch(engine.module, dataset, config, truth, device)
        progress = record_evaluation(evaluation, progress, epoch + 1, folder, log)
        checkpoint.save(
            engine, folder, progress, config, dataset.labels, config.engine.keep_checkpoints
        )
        if main:
            publish_best(folder, progress)
    best = checkpoint.checkpoint_path(folder, progress.best_step)
    if main:
        finish(best, dataset, config, folder, device)
        log.write("event", progress.step, float(progress.epoch), event="finished")
    dist.barrier()
    return best


def claim(folder: Path, config: RunConfig, dataset: Dataset) -> None:
    """Writes what the run is, or checks that the folder is a run of the same config and data."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "config": json.loads(config.to_json()),
        "config_digest": config.digest(),
        "train_digest": dataset.train.digest,
        "val_digest": dataset.val.digest,
        "labels": asdict(dataset.labels),
    }
    path = folder / "config.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for part in ("config_digest", "train_digest", "val_digest"):
            if before[part] != identity[part]:
                raise UserError(
                    f"run folder {folder} belongs to another {part.split('_')[0]}: got "
                    f"{identity[part][:12]}, expected {before[part][:12]}; choose another --output"
                )
    _write_json(path, identity)


def build(config: RunConfig, epoch_steps: int, device: torch.device) -> tuple[Any, torch.nn.Module]:
    """The DeepSpeed engine around the seeded model, and the criterion."""
    seed_step(config.seed, 0, 0)  # the same initial weights on every rank
    model = build_model(config.model)
    if config.init.backbone:
        load_backbone(model, Path(config.init.backbone))
    if config.init.weights:
        state = torch.load(config.init.weights, map_location="cpu", weights_only=True)
        load_official(model, state.get("model", state))
    engine = build_engine(model.to(device), config, epoch_steps)
    return engine, build_criterion(config.model).to(device)


def train_epoch(
    engine: Any,
    criterion: torch.nn.Module,
    dataset: Dataset,
    config: RunConfig,
    progress: Progress,
    folder: Path,
    log: MetricsLog,
    device: torch.device,
) -> Progress:
    """Trains from `progress` to the end of its epoch, logging and checkpointing on the way."""
    rank, world = dist.get_rank(), dist.get_world_size()
    epoch_steps = steps_per_epoch(dataset.train, config.optimizer.batch_size)
    steps = training_steps(
        dataset.train, dataset.labels, config, progress.epoch, progress.step_in_epoch,
        rank, world, device.type == "cuda",
    )  # fmt: skip
    engine.train()
    meter = Meter(config.optimizer.batch_size)
    for micro_batches in meter.timed(steps):
        seed_step(config.seed, progress.step, rank)
        num_boxes = global_boxes(micro_batches, device)
        for batch in micro_batches:
            batch = batch.to(device)
            outputs = engine(batch.normalized_images(), batch.padding_mask)
            # Averaged over micro-batches and ranks by the engine; so the share of each is scaled
            # back to a sum over the whole global batch, divided by its number of boxes.
            losses = criterion(outputs, batch.targets, num_boxes / (world * len(micro_batches)))
            engine.backward(losses["loss"])
            engine.step()
            meter.add(losses)
        progress = replace(
            progress, step=progress.step + 1, step_in_epoch=progress.step_in_epoch + 1
        )
        last = progress.step_in_epoch == epoch_steps
        if progress.step % config.engine.log_every == 0 or last:
            values = meter.flush(progress.step, len(micro_batches))
            values |= {"lr": rate_of(engine), "grad_norm": float(engine.get_global_grad_norm())}
            if rank == 0:
                log.write("train", progress.step, progress.step / epoch_steps, **values)
        every = config.engine.checkpoint_steps
        if every and progress.step % every == 0 and not last:
            checkpoint.save(
                engine, folder, progress, config, dataset.labels, config.engine.keep_checkpoints
            )
    return replace(progress, epoch=progress.epoch + 1, step_in_epoch=0)


def global_boxes(micro_batches: list[Any], device: torch.device) -> torch.Tensor:
    """Number of boxes in the whole global batch, at least 1: what losses are normalised by."""
    count = sum(len(t["labels"]) for batch in micro_batches for t in batch.targets)
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)
    return total.clamp(min=1)


def rate_of(engine: Any) -> float:
    """The largest group's learning rate, for the next step."""
    return max(group["lr"] for group in engine.optimizer.param_groups)


class Meter:
    """Means of the losses over the steps and ranks since the last line, and the speed."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def timed(self, steps: Any) -> Any:
        """Passes the steps on, counting them and the seconds spent waiting for data."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            step = next(iterator, None)
            if step is None:
                return
            self.waited += time.perf_counter() - start
            self.steps += 1
            yield step

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def flush(self, step: int, micro_batches: int) -> dict[str, float]:
        """Losses, images_per_second and data_wait (share of the time) since the last call
        (collective). Raises `FloatingPointError` when a loss is not finite."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[n].float() for n in names])
        means = means / (self.steps * micro_batches * dist.get_world_size())
        dist.all_reduce(means)
        values = dict(zip(names, means.tolist(), strict=True))
        bad = [name for name, value in values.items() if not torch.isfinite(torch.tensor(value))]
        if bad:
            raise FloatingPointError(f"step {step}: not finite: {', '.join(bad)}")
        seconds = time.perf_counter() - self.since
        values["images_per_second"] = self.steps * self.batch_size / seconds
        values["data_wait"] = self.waited / seconds
        if torch.cuda.is_available():
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.sums, self.steps, self.waited, self.since = {}, 0, 0.0, time.perf_counter()
        return values


def evaluate_epoch(
    model: torch.nn.Module, dataset: Dataset, config: RunConfig, truth: Any, device: torch.device
) -> Evaluation | None:
    """The evaluation on rank 0, None elsewhere (collective)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = detect(model, dataset.val, dataset.labels, config, device, rank, world)
    detections = gather(mine)
    return None if detections is None else summarize(truth, detections)


def record_evaluation(
    evaluation: Evaluation | None, progress: Progress, epoch: int, folder: Path, log: MetricsLog
) -> Progress:
    """Logs it and returns the progress with the best so far, equal on every rank (collective)."""
    best: list[Any] = [progress.best_ap, progress.best_step]
    if evaluation is not None:
        summary, per_class = evaluation.summary, evaluation.per_class
        if summary["AP"] > progress.best_ap or progress.best_step < 0:
            best = [summary["AP"], progress.step]
        classes = {f"AP/{name}": value for name, value in per_class.items()}
        log.write("evaluation", progress.step, float(epoch), **summary, **classes)
        path = evaluation_path(folder, progress.step)
        path.parent.mkdir(exist_ok=True)
        _write_json(path, {"epoch": epoch, "summary": summary, "per_class": per_class})
    dist.broadcast_object_list(best, src=0)
    return replace(progress, best_ap=best[0], best_step=best[1])


def evaluation_path(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"step-{step:08d}.json"


def publish_best(folder: Path, progress: Progress) -> None:
    """Writes best.json: the name of the best checkpoint and its evaluation."""
    if progress.best_step >= 0:
        name = checkpoint.checkpoint_path(folder, progress.best_step).name
        evaluation = evaluation_path(folder, progress.best_step)
        content = json.loads(evaluation.read_text(encoding="utf-8"))
        _write_json(folder / "best.json", {"checkpoint": name, **content})


def finish(
    best: Path, dataset: Dataset, config: RunConfig, folder: Path, device: torch.device
) -> None:
    """Draws the best checkpoint's predictions on validation images (rank 0)."""
    model = build_model(config.model)
    model.load_state_dict(checkpoint.load_model(best)["model"])
    path = folder / "predictions.png"
    draw_predictions(model.to(device), dataset.val, dataset.labels, config, device, path)


def _write_json(path: Path, content: Any) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(aside, path)
