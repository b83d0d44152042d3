"""From an engine to a checkpoint, written while training goes on, and back.

Collective functions must be called by every rank.
"""

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint_store import (
    Progress,
    load_model,
    load_progress,
    load_training,
    newest_intact,
    prune,
    write,
)
from pipeline.config import RunConfig
from pipeline.data.labels import Labels
from pipeline.training_state import gather, restore


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, beside its training.

    `saved(progress)` is called on rank 0, in the writing thread, once a checkpoint is whole.
    """

    def __init__(
        self, folder: Path, config: RunConfig, labels: Labels, saved: Callable[[Progress], None]
    ) -> None:
        self.folder, self.config, self.labels, self.saved = folder, config, labels, saved
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, engine: Any, progress: Progress) -> None:
        """Copies all that a checkpoint holds and starts to write it (collective). Waits for the
        one before, and raises what went wrong there."""
        training = gather(engine)
        if dist.get_rank() != 0:
            return
        model = {
            "model": copied(engine.module),
            "config": self.config.to_json(),
            "labels": asdict(self.labels),
            "progress": asdict(progress),
        }
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(progress, model, training))
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what went wrong in writing."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raises what went wrong in writing, if anything has by now."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, progress: Progress, model: dict[str, Any], training: Any) -> None:
        try:
            write(self.folder, progress, model, training)
            self.saved(progress)
            prune(self.folder, self.config.engine.keep_checkpoints, progress.best_step)
        except OSError as error:
            self._failure = OSError(
                f"the checkpoint after step {progress.step} cannot be written: {error}; those "
                f"before it are intact, and the same command goes on from there"
            )
        except Exception as error:  # told by the training thread
            self._failure = error


def resume(engine: Any, folder: Path, warn: Callable[[str], None]) -> Progress | None:
    """Loads the newest intact checkpoint into the engine (collective), or returns None. It may have
    been written by another number of processes, in another ZeRO stage.

    `warn(message)` is told on rank 0 of every checkpoint that had to be passed over.
    """
    found: list[Path | None] = [newest_intact(folder, warn) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    path = found[0]
    if path is None:
        return None
    progress = load_progress(path)
    restore(engine, load_training(path), load_model(path)["model"])
    return progress


def copied(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict on the CPU, in memory of its own."""
    return {
        name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()
    }
