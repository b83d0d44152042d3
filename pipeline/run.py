"""A run: what stays the same from the first step of a process to its last, and its beginning."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.criterion import build_criterion
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointWriter, State
from pipeline.checkpoint_store import Progress
from pipeline.config import RunConfig
from pipeline.data.loader import CUTS, steps_per_epoch
from pipeline.data.order import first_step
from pipeline.dataset import Dataset, open_dataset
from pipeline.ema import Ema
from pipeline.engine import build_engine, choose_device, set_determinism, start_process_group
from pipeline.evaluate import ground_truth
from pipeline.initialise import initial_model
from pipeline.meter import Meter
from pipeline.run_folder import (
    best_evaluated,
    claim,
    hold,
    publish_best,
    saying_what_is_saved,
)
from pipeline.stop import StopRequest, stop_request
from pipeline.tracking import MetricsLog
from pipeline.update import Updater


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a process to its last."""

    config: RunConfig
    folder: Path
    dataset: Dataset
    state: State
    criterion: nn.Module
    device: torch.device
    log: MetricsLog
    checkpoints: CheckpointWriter
    request: StopRequest
    initial: str  # what the weights before the first step were
    truth: Any  # pycocotools' COCO on rank 0, else None
    steps_per_epoch: float
    rank: int
    world: int

    def end_of_epoch(self, epochs: int) -> int:
        """The number of steps after which every sample has been seen `epochs` times."""
        return first_step(len(self.dataset.train), self.config.optimizer.batch_size, epochs)


@contextmanager
def started(config: RunConfig, folder: Path) -> Iterator[Run]:
    """Opens the data, joins the process group, takes the run folder and builds the engine; the
    folder is held as long as the block lasts."""
    device = choose_device(config.engine)
    dataset = open_dataset(config)
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    epoch_steps = steps_per_epoch(dataset.train, config.optimizer.batch_size)
    # Before the folder is claimed: it may find a mistake.
    model, initial = initial_model(config, dataset.labels.names)
    rank, world = start_process_group(device, config.engine.collective_timeout)
    with (
        hold(folder, rank == 0),
        saying_what_is_saved(folder),
        stop_request(folder, look=rank == 0) as request,
    ):
        if rank == 0:
            claim(folder, config, dataset)
        dist.barrier()
        set_determinism(config.engine.deterministic)
        kept, best = kept_steps(config, dataset), partial(publish_best, folder)
        log = MetricsLog(folder)

        def warn(progress: Progress, text: str) -> None:
            epoch = progress.step / epoch_steps
            log.write("event", progress.step, epoch, event="message", text=text)

        checkpoints = CheckpointWriter(folder, config, dataset.labels, kept, best, warn)
        try:
            yield Run(
                config=config,
                folder=folder,
                dataset=dataset,
                state=new_state(config, model.to(device), epoch_steps),
                criterion=build_criterion(config.model).to(device),
                device=device,
                log=log,
                checkpoints=checkpoints,
                request=request,
                initial=initial,
                truth=ground_truth(dataset.val) if rank == 0 else None,
                steps_per_epoch=epoch_steps,
                rank=rank,
                world=world,
            )
        finally:
            # While the folder is held: it would remove checkpoints that the next training needs.
            checkpoints.end()


def new_state(config: RunConfig, model: nn.Module, epoch_steps: float) -> State:
    """The engine around the model, and what else is trained with it (collective)."""
    decay = config.optimizer.ema_decay
    ema = Ema(model, decay) if decay else None
    device = next(model.parameters()).device
    engine = build_engine(model, config, epoch_steps)
    return State(engine, Updater(engine, config), ema, Meter(config.optimizer.batch_size, device))


def kept_steps(config: RunConfig, dataset: Dataset) -> frozenset[int]:
    """The steps at which those epochs end whose checkpoints are kept for good."""
    every = config.engine.keep_every_epochs
    epochs = range(every, config.schedule.epochs + 1, every) if every else ()
    size, batch_size = len(dataset.train), config.optimizer.batch_size
    return frozenset(first_step(size, batch_size, epoch) for epoch in epochs)


def resume(run: Run) -> Progress:
    """Continues the newest intact checkpoint, if there is one, and opens the log (collective)."""
    said: list[str] = []
    progress = checkpoint.resume(run.state, run.folder, said.append) or Progress()
    progress = best_that_is_left(run, progress)
    if progress.epoch == run.config.schedule.epochs:
        said.append(f"all {progress.epoch} epochs were trained before; nothing is left to do")
    elif progress.step:
        said.append(f"resumed after step {progress.step}, in epoch {progress.epoch + 1}")
    elif run.initial:
        said.append(run.initial)
    if run.rank == 0:
        run.log.rewind(progress.step, progress.epoch)
        epochs = run.config.schedule.epochs
        length = {"steps": run.end_of_epoch(epochs), "epochs": epochs, "world": run.world}
        cuts = {name: getattr(run.config.engine, name) for name in CUTS}
        epoch = progress.step / run.steps_per_epoch
        run.log.write("event", progress.step, epoch, event="start", **length, **cuts)
        for text in said:
            run.log.write("event", progress.step, epoch, event="message", text=text)
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
