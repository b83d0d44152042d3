"""From an engine to a checkpoint, written while training goes on, and back.

Collective functions must be called by every rank.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from pipeline.checkpoint_store import (
    Progress,
    load_model,
    load_progress,
    load_training,
    prune,
    take_over,
    write,
)
from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.ema import Ema
from pipeline.machine_errors import of_the_system
from pipeline.meter import Meter
from pipeline.storage import patiently
from pipeline.training_state import gather, restore
from pipeline.update import LossScale, Updater
from pipeline.zero3 import is_partitioned, partition, weights_on_host, whole_copy


@dataclass(frozen=True)
class State:
    """All that a step changes beside `Progress`. Generators are seeded for each step anew, and
    what sample comes next follows from the step."""

    engine: Any  # a DeepSpeedEngine
    updater: Updater
    ema: Ema | None
    meter: Meter

    def __post_init__(self) -> None:
        if self.ema and is_partitioned(self.engine.module):
            partition(self.ema.module)

    @property
    def model(self) -> nn.Module:
        """What is evaluated: the average of the weights where there is one. In ZeRO stage 3 a whole
        copy of it (collective)."""
        kept = self.kept
        return whole_copy(kept, self.engine.skeleton) if is_partitioned(kept) else kept

    @property
    def kept(self) -> nn.Module:
        """The same, in parts where the engine's parameters are."""
        return self.ema.module if self.ema else self.engine.module


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, beside its training.

    On rank 0, in the writing thread, `saved(progress)` is called once a checkpoint is whole, and
    `warn(progress, message)` where old ones cannot be removed. Those of `kept_steps` never are.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        labels: Labels,
        kept_steps: frozenset[int],
        saved: Callable[[Progress], None],
        warn: Callable[[Progress, str], None],
    ) -> None:
        self.folder, self.config, self.labels, self.saved = folder, config, labels, saved
        self.kept_steps, self.warn = kept_steps, warn
        self._told: set[str] = set()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, state: State, progress: Progress) -> None:
        """Copies all that a checkpoint holds and starts to write it (collective). Waits for the
        one before, and raises what went wrong there."""
        training = {**gather(state.engine), "meter": state.meter.gather()}
        writes = dist.get_rank() == 0
        weights = weights_on_host(state.kept, writes)
        if state.ema:
            training["weights"] = weights_on_host(state.engine.module, writes)
        if not writes:
            return
        training["loss_scale"] = asdict(state.updater.scale)
        training["grad_norm"] = state.updater.grad_norm
        if state.ema:
            training["ema_updates"] = state.ema.updates
        model = {
            "model": weights,
            "config": self.config.to_json(),
            "labels": asdict(self.labels),
            "progress": asdict(progress),
        }
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(progress, model, training))
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong in writing."""
        self.end()
        self.raise_failure()

    def end(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def raise_failure(self) -> None:
        """Raises what went wrong in writing, if anything has by now."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, progress: Progress, model: dict[str, Any], training: Any) -> None:
        try:
            patiently(lambda: write(self.folder, progress, model, training))
        except OSError as error:
            # A write to a full disk does not tell the file that it was for.
            reason = error if error.filename else f"{self.folder}: {error}"
            self._failure = OSError(
                f"the checkpoint after step {progress.step} cannot be written: {reason}; those "
                f"before it are intact, and the same command goes on from there"
            )
            return
        except Exception as error:  # told by the training thread
            self._failure = error
            return
        try:
            self.saved(progress)
            self._prune(progress)
        except Exception as error:
            self._failure = error

    def _prune(self, progress: Progress) -> None:
        def once(message: str) -> None:
            if message not in self._told:
                self._told.add(message)
                self.warn(progress, message)

        keep, kept = self.config.engine.keep_checkpoints, self.kept_steps | {progress.best_step}
        try:
            prune(self.folder, progress.step, keep, kept, once)
        except OSError as error:  # the folder's list cannot be read; the next time, maybe
            once(f"old checkpoints cannot be removed: {of_the_system(error)}")


class Clock:
    """When the next checkpoint is due, by the time of one process."""

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.since >= self.seconds


def resume(state: State, folder: Path, warn: Callable[[str], None]) -> Progress | None:
    """Loads the newest intact checkpoint (collective), or returns None. It may have been written by
    another number of processes, in another ZeRO stage. Rank 0 holds the run folder.

    `warn(message)` is told on rank 0 of every checkpoint that had to be passed over.
    """
    found: list[Path | None] = [take_over(folder, warn) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return None if found[0] is None else load(state, found[0])


def load(state: State, path: Path) -> Progress:
    """Puts what has not trained yet where the checkpoint's run was."""
    progress = patiently(lambda: load_progress(path))
    training = patiently(lambda: load_training(path))
    weights = patiently(lambda: load_model(path))["model"]
    if state.ema:
        state.ema.restore(weights, training["ema_updates"])
    restore(state.engine, training, training.get("weights", weights), progress.step)
    state.updater.scale = LossScale(**training["loss_scale"])
    state.updater.grad_norm = training["grad_norm"]
    state.meter.restore(training["meter"])
    return progress
