"""The training loop: from a `RunConfig` and a run folder to a trained, evaluated detector.

Starting a run whose folder exists resumes it. Nothing here knows who launched it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.detr import build_model
from pipeline.bad_step import require_finite_weights, saved_steps
from pipeline.checkpoint import Clock
from pipeline.checkpoint_store import Progress, checkpoint_path, load_model
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import on_device, training_steps
from pipeline.engine import naming_timeouts
from pipeline.errors import Stopped, UserError
from pipeline.evaluate import detect, gather, summarize
from pipeline.run import Run, resume, started
from pipeline.run_folder import write_detections, write_evaluation
from pipeline.sanity_check import label_check
from pipeline.step import summed, take_step
from pipeline.visualize import draw_predictions


def train(config: RunConfig, folder: Path) -> Path:
    """Trains to the end of the schedule and returns the best checkpoint's folder (collective).

    The run's identity is checked against `folder/config.json`; the newest intact checkpoint there
    is continued. Rank 0 writes `metrics.jsonl`, `evaluations/`, `best.json` and, at the end,
    `predictions.png`.

    Raises:
        UserError: a mistake in the config; FolderInUse: another training has the folder.
        FloatingPointError: losses or gradients were not finite (on all ranks).
        Stopped: it was asked to stop, by a signal or the file `stop` in the folder (on all ranks).
        Unreachable: another process did not do its part in time.
    """
    with naming_timeouts(config.engine.collective_timeout), started(config, folder) as run:
        progress = resume(run)
        if progress.step == 0 and run.config.init.weights:
            with naming_step(run, progress):
                label_check(run, progress)
        steps = remaining_steps(run, progress)
        for epoch in range(progress.epoch, run.config.schedule.epochs):
            progress = train_epoch(run, progress, steps)
            if run.config.schedule.evaluates(epoch + 1):
                with naming_step(run, progress):
                    progress = evaluate_epoch(run, progress, epoch + 1)
            else:
                progress = replace(progress, epoch=epoch + 1)
            save(run, progress)
        run.checkpoints.wait()
        best = checkpoint_path(folder, progress.best_step)
        if run.rank == 0:
            draw_best(run, best)
            run.log.write("event", progress.step, float(progress.epoch), event="finished")
        dist.barrier()
    return best


def train_epoch(run: Run, progress: Progress, steps: Iterator[list[Batch]]) -> Progress:
    """Trains from `progress` to the end of its epoch, logging and checkpointing on the way."""
    settings = run.config.engine
    run.state.engine.train()
    clock = Clock(settings.checkpoint_minutes)
    last_step = run.end_of_epoch(progress.epoch + 1)
    for micro_batches in run.state.meter.timed(islice(steps, last_step - progress.step)):
        outcome = take_step(run, progress, micro_batches, clock.due())
        progress = replace(progress, step=progress.step + 1, skipped=outcome.skipped)
        if outcome.why and run.rank == 0:
            said = f"left out (skipped in a row: {outcome.skipped}): {outcome.why}"
            run.log.write("event", progress.step, epochs(run, progress), event="message", text=said)
        last = progress.step == last_step
        if last or _is_multiple(progress.step, settings.log_every):
            log_step(run, progress)
        if progress.step == run.config.engine.check_after:
            with naming_step(run, progress):
                label_check(run, progress)
        if outcome.stop:
            stop(run, progress)
        if outcome.save or (not last and _is_multiple(progress.step, settings.checkpoint_steps)):
            save(run, progress)
            clock.restart()
    return progress


@contextmanager
def naming_step(run: Run, progress: Progress) -> Iterator[None]:
    """Adds to the error of predictions that are not finite the step, and what helps."""
    try:
        yield
    except FloatingPointError as error:
        if progress.step == 0:
            raise UserError(f"init.weights {run.config.init.weights}: {error}") from error
        saved = saved_steps(run.folder)
        bad = f"; a step that went wrong is saved in {saved[-1]}" if saved else ""
        raise FloatingPointError(
            f"after step {progress.step} the {error}; the training has diverged: begin anew, with "
            f"another --output, with a lower --optimizer.lr (got {run.config.optimizer.lr:g}) or "
            f"a longer --schedule.warmup-fraction{bad}"
        ) from error


def _is_multiple(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def epochs(run: Run, progress: Progress) -> float:
    """How many of them were trained. The step that completes one may have begun the next; it
    counts as its end."""
    return min(progress.step / run.steps_per_epoch, progress.epoch + 1.0)


def remaining_steps(run: Run, progress: Progress) -> Iterator[list[Batch]]:
    """This rank's micro-batches on the device, for each step from `progress` to the run's end."""
    steps = training_steps(
        run.dataset.train,
        run.dataset.labels,
        run.config,
        range(progress.step, run.end_of_epoch(run.config.schedule.epochs)),
        run.rank,
        run.world,
        pin_memory=run.device.type == "cuda",
    )
    return on_device(steps, run.device)


def log_step(run: Run, progress: Progress) -> None:
    """Writes to the log what the meter has since the last time, the learning rate and the norm of
    the gradient (collective). Raises what went wrong in writing a checkpoint."""
    run.checkpoints.raise_failure()
    values = run.state.meter.flush()
    values["lr"] = max(group["lr"] for group in run.state.engine.optimizer.param_groups)
    values["grad_norm"] = run.state.updater.grad_norm
    if run.state.updater.scale.dynamic:
        values["loss_scale"] = run.state.updater.scale.value
    if run.rank == 0:
        run.log.write("train", progress.step, epochs(run, progress), **values)


def save(run: Run, progress: Progress) -> None:
    """Leaves a checkpoint of the step (collective). Raises where weights are not finite."""
    require_finite_weights(run.state.engine.module, progress.step)
    run.checkpoints.save(run.state, progress)


def stop(run: Run, progress: Progress) -> None:
    """Leaves a checkpoint and raises `Stopped` (collective)."""
    save(run, progress)
    run.checkpoints.wait()
    text = f"stopped after step {progress.step} as asked; the same command goes on from there"
    if run.rank == 0:
        run.log.write("event", progress.step, epochs(run, progress), event="stopped", text=text)
    raise Stopped(text)


def evaluate_epoch(run: Run, progress: Progress, epoch: int) -> Progress:
    """Evaluates, logs, and returns the progress with the epoch and the best so far (collective).
    A stop that is asked for meanwhile leaves the evaluation to the next start."""

    def stop_if_asked() -> None:
        if summed([run.request.asked], run.device).item():
            stop(run, progress)

    val, labels = run.dataset.val, run.dataset.labels
    mine = detect(
        run.state.model, val, labels, run.config, run.device, run.rank, run.world, stop_if_asked
    )
    detections = gather(mine)
    best: list[Any] = [progress.best_ap, progress.best_step]
    if detections is not None:
        evaluation = summarize(run.truth, detections)
        if evaluation.summary["AP"] > progress.best_ap or progress.best_step < 0:
            best = [evaluation.summary["AP"], progress.step]
            write_detections(run.folder, evaluation)
        write_evaluation(run.folder, progress.step, epoch, evaluation)
        classes = {f"AP/{name}": value for name, value in evaluation.per_class.items()}
        run.log.write("evaluation", progress.step, float(epoch), **evaluation.summary, **classes)
    dist.broadcast_object_list(best, src=0)
    return replace(progress, epoch=epoch, best_ap=best[0], best_step=best[1])


def draw_best(run: Run, path: Path) -> None:
    """Draws the best checkpoint's predictions on validation images."""
    model = build_model(run.config.model)
    model.load_state_dict(load_model(path)["model"])
    data, picture = run.dataset, run.folder / "predictions.png"
    draw_predictions(model.to(run.device), data.val, data.labels, run.config, run.device, picture)
