"""The training loop: from a `RunConfig` and a run folder to a trained, evaluated detector.

Starting a run whose folder exists resumes it. Nothing here knows who launched it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.criterion import build_criterion
from model.detr import build_model
from pipeline import checkpoint
from pipeline.bad_step import LossCheck, Place, require_finite_weights
from pipeline.checkpoint import CheckpointWriter
from pipeline.checkpoint_store import Progress, checkpoint_path, load_model
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import on_device, steps_per_epoch, training_steps
from pipeline.data.order import first_step
from pipeline.dataset import Dataset, open_dataset
from pipeline.engine import build_engine, choose_device, seed_step, start_process_group
from pipeline.evaluate import detect, gather, ground_truth, summarize
from pipeline.initialise import initial_model
from pipeline.meter import Meter
from pipeline.run_folder import best_evaluated, claim, publish_best, write_evaluation
from pipeline.tracking import MetricsLog
from pipeline.visualize import draw_predictions


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a process to its last."""

    config: RunConfig
    folder: Path
    dataset: Dataset
    engine: Any  # a DeepSpeedEngine
    criterion: nn.Module
    device: torch.device
    log: MetricsLog
    checkpoints: CheckpointWriter
    initial: str  # what the weights before the first step were
    truth: Any  # pycocotools' COCO on rank 0, else None
    steps_per_epoch: float
    rank: int
    world: int


def train(config: RunConfig, folder: Path) -> Path:
    """Trains to the end of the schedule and returns the best checkpoint's folder (collective).

    The run's identity is checked against `folder/config.json`; the newest intact checkpoint there
    is continued. Rank 0 writes `metrics.jsonl`, `evaluations/`, `best.json` and, at the end,
    `predictions.png`. Raises `UserError` for a mistake in the config, and on the ranks where a loss
    is not finite `FloatingPointError`; the launcher is to end the others.
    """
    run = start(config, folder)
    progress = resume(run)
    steps = remaining_steps(run, progress)
    for epoch in range(progress.epoch, run.config.schedule.epochs):
        progress = train_epoch(run, progress, steps)
        progress = evaluate_epoch(run, progress, epoch + 1)
        save(run, progress)
    run.checkpoints.wait()
    best = checkpoint_path(folder, progress.best_step)
    if run.rank == 0:
        draw_best(run, best)
        run.log.write("event", progress.step, float(progress.epoch), event="finished")
    dist.barrier()
    return best


def start(config: RunConfig, folder: Path) -> Run:
    """Opens the data, joins the process group and builds the engine."""
    device = choose_device(config.engine)
    dataset = open_dataset(config)
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    epoch_steps = steps_per_epoch(dataset.train, config.optimizer.batch_size)
    model, initial = initial_model(config)  # before the folder is claimed: it may find a mistake
    rank, world = start_process_group(device)
    if rank == 0:
        claim(folder, config, dataset)
    dist.barrier()
    torch.use_deterministic_algorithms(config.engine.deterministic)
    return Run(
        config=config,
        folder=folder,
        dataset=dataset,
        engine=build_engine(model.to(device), config, epoch_steps),
        criterion=build_criterion(config.model).to(device),
        device=device,
        log=MetricsLog(folder),
        checkpoints=CheckpointWriter(folder, config, dataset.labels, partial(publish_best, folder)),
        initial=initial,
        truth=ground_truth(dataset.val) if rank == 0 else None,
        steps_per_epoch=epoch_steps,
        rank=rank,
        world=world,
    )


def resume(run: Run) -> Progress:
    """Continues the newest intact checkpoint, if there is one, and opens the log (collective)."""
    said: list[str] = []
    progress = checkpoint.resume(run.engine, run.folder, said.append) or Progress()
    progress = best_that_is_left(run, progress)
    if progress.epoch == run.config.schedule.epochs:
        said.append(f"all {progress.epoch} epochs were trained before; nothing is left to do")
    elif progress.step:
        said.append(f"resumed after step {progress.step}, in epoch {progress.epoch + 1}")
    elif run.initial:
        said.append(run.initial)
    if run.rank == 0:
        run.log.rewind(progress.step)
        epochs = run.config.schedule.epochs
        length = {"steps": end_of_epoch(run, epochs), "epochs": epochs, "world": run.world}
        run.log.write("event", progress.step, float(progress.epoch), event="start", **length)
        for text in said:
            run.log.write("event", progress.step, float(progress.epoch), event="message", text=text)
        publish_best(run.folder, progress)  # a crash may have come between checkpoint and this
    return progress


def best_that_is_left(run: Run, progress: Progress) -> Progress:
    """`progress` with the best of the checkpoints that are there (collective). The one that it
    names may have been removed for a better one, which was damaged since."""
    found: list[Any] = [progress.best_ap, progress.best_step]
    if run.rank == 0 and progress.best_step >= 0:
        found = list(best_evaluated(run.folder, progress))
    dist.broadcast_object_list(found, src=0)
    return replace(progress, best_ap=found[0], best_step=found[1])


def train_epoch(run: Run, progress: Progress, steps: Iterator[list[Batch]]) -> Progress:
    """Trains from `progress` to the end of its epoch, logging and checkpointing on the way."""
    engine, settings = run.engine, run.config.engine
    engine.train()
    meter = Meter(run.config.optimizer.batch_size)
    last_step = end_of_epoch(run, progress.epoch + 1)
    for micro_batches in meter.timed(islice(steps, last_step - progress.step)):
        seed_step(run.config.seed, progress.step, run.rank)
        # The engine averages over micro-batches and ranks. This normaliser makes that average the
        # loss of the whole global batch, divided by its number of boxes.
        passes = len(micro_batches)
        num_boxes = global_boxes(micro_batches, run.device) / (run.world * passes)
        place = Place(run.folder, run.config, progress.step + 1, progress.epoch, run.rank)
        for i, batch in enumerate(micro_batches):
            # A bound on padding may cut a step into more passes than the engine was told.
            engine.set_gradient_accumulation_boundary(i == passes - 1)
            check = LossCheck(place, engine.module, batch, num_boxes)
            outputs = engine(batch.normalized_images(), batch.padding_mask)
            losses = check.losses(run.criterion, outputs)
            engine.backward(losses["loss"] * (engine.gradient_accumulation_steps() / passes))
            check.require_finite()
            engine.step()
            meter.add(losses, passes)
        progress = replace(progress, step=progress.step + 1)
        last = progress.step == last_step
        saves = not last and is_multiple(progress.step, settings.checkpoint_steps)
        # A line before each checkpoint: a resumed run then averages over the same steps.
        if last or saves or is_multiple(progress.step, settings.log_every):
            log_step(run, progress, meter)
        if saves:
            save(run, progress)
    return replace(progress, epoch=progress.epoch + 1)


def is_multiple(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def end_of_epoch(run: Run, epochs: int) -> int:
    """The number of steps after which every sample has been seen `epochs` times."""
    return first_step(len(run.dataset.train), run.config.optimizer.batch_size, epochs)


def remaining_steps(run: Run, progress: Progress) -> Iterator[list[Batch]]:
    """This rank's micro-batches on the device, for each step from `progress` to the run's end."""
    steps = training_steps(
        run.dataset.train,
        run.dataset.labels,
        run.config,
        range(progress.step, end_of_epoch(run, run.config.schedule.epochs)),
        run.rank,
        run.world,
        pin_memory=run.device.type == "cuda",
    )
    return on_device(steps, run.device)


def global_boxes(micro_batches: list[Batch], device: torch.device) -> Tensor:
    """Number of boxes in the whole global batch, at least 1 (collective)."""
    count = sum(len(t["labels"]) for batch in micro_batches for t in batch.targets)
    # Filled on the device: a copy from the host would wait for the step before.
    total = torch.full((), count, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return total.clamp(min=1)


def log_step(run: Run, progress: Progress, meter: Meter) -> None:
    run.checkpoints.raise_failure()
    values = meter.flush()
    values["lr"] = max(group["lr"] for group in run.engine.optimizer.param_groups)
    values["grad_norm"] = float(run.engine.get_global_grad_norm())
    if run.rank == 0:
        # The step that completes an epoch may have begun the next; it counts as this one's end.
        epoch = min(progress.step / run.steps_per_epoch, progress.epoch + 1.0)
        run.log.write("train", progress.step, epoch, **values)


def save(run: Run, progress: Progress) -> None:
    require_finite_weights(run.engine.module, progress.step)
    run.checkpoints.save(run.engine, progress)


def evaluate_epoch(run: Run, progress: Progress, epoch: int) -> Progress:
    """Evaluates, logs, and returns the progress with the best so far (collective)."""
    val, labels = run.dataset.val, run.dataset.labels
    mine = detect(run.engine.module, val, labels, run.config, run.device, run.rank, run.world)
    detections = gather(mine)
    best: list[Any] = [progress.best_ap, progress.best_step]
    if detections is not None:
        evaluation = summarize(run.truth, detections)
        if evaluation.summary["AP"] > progress.best_ap or progress.best_step < 0:
            best = [evaluation.summary["AP"], progress.step]
        write_evaluation(run.folder, progress.step, epoch, evaluation)
        classes = {f"AP/{name}": value for name, value in evaluation.per_class.items()}
        run.log.write("evaluation", progress.step, float(epoch), **evaluation.summary, **classes)
    dist.broadcast_object_list(best, src=0)
    return replace(progress, best_ap=best[0], best_step=best[1])


def draw_best(run: Run, path: Path) -> None:
    """Draws the best checkpoint's predictions on validation images."""
    model = build_model(run.config.model)
    model.load_state_dict(load_model(path)["model"])
    data, picture = run.dataset, run.folder / "predictions.png"
    draw_predictions(model.to(run.device), data.val, data.labels, run.config, run.device, picture)
