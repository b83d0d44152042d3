"""A step of a run taken again on one device, and what in it is not finite.

From what a rank saved of a step that went wrong, or from the checkpoint before any step: the data
position and the generators follow from the step's number.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.bad_step import LossCheck, Place, describe, saved_steps, step_of
from pipeline.checkpoint import State, load
from pipeline.checkpoint_store import Progress, check, checkpoint_path, checkpoint_steps
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import CUTS, steps_per_epoch, training_steps
from pipeline.dataset import Dataset, open_dataset
from pipeline.engine import AUTOCAST, seed_step, set_determinism, start_process_group
from pipeline.errors import UserError
from pipeline.initialise import initial_model
from pipeline.run import new_state
from pipeline.run_folder import read_identity
from pipeline.tracking import read_lines


def replay_saved(file: Path, device: torch.device) -> tuple[dict[str, Tensor], str]:
    """Runs a saved step's forward pass and losses again: the losses ({} where the matcher refuses
    the predictions), and what is not finite, the first module to say so among it.

    Exact on the kind of device where it happened. Raises `UserError` for another file.
    """
    saved = _read(file)
    config = RunConfig.from_json(saved["config"])
    model = build_model(config.model)
    # Taken as they are, because how their numbers lie in memory decides how a sum is rounded.
    model.load_state_dict(saved["model"], assign=True)
    model.to(device).train()
    set_determinism(config.engine.deterministic)
    batch = Batch(**saved["batch"]).to(device)
    dtype = AUTOCAST.get(config.engine.precision)
    torch.set_rng_state(saved["generators"]["cpu"])
    if device.type == "cuda" and "cuda" in saved["generators"]:
        torch.cuda.set_rng_state(saved["generators"]["cuda"], device)
    losses: dict[str, Tensor] = {}
    # The engine casts the model alone; matching and losses stay in full precision.
    with torch.no_grad(), _first_bad_module(model) as first:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            outputs = model(*batch.training_inputs(config.model))
        refused = ""
        try:
            losses = build_criterion(config.model).to(device)(
                outputs, batch.targets, saved["num_boxes"].to(device)
            )
        except FloatingPointError as error:
            refused = str(error)
    lines = [
        f"step {saved['step']}, rank {saved['rank']}, images {batch.image_ids}",
        f"first module with an output that is not finite: {first[0] if first else 'none'}",
        f"loss: {float(losses['loss']) if losses else refused}",
        f"not finite: {describe(model, batch, outputs, losses)}",
    ]
    return losses, "\n".join(lines)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(
            f"{str(file)!r} is no file; expected one of a run folder's non_finite/, or a run "
            f"folder and a step"
        )
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict) or "generators" not in saved:
        raise UserError(f"{file} is no saved step; expected one of a run folder's non_finite/")
    return saved


@contextmanager
def _first_bad_module(model: nn.Module) -> Iterator[list[str]]:
    """Collects, in order of execution, the names of modules that make numbers not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Replayed:
    """A step that was taken again. `losses`: means over the whole global batch, as in a line of
    metrics.jsonl; `grad_norm` before clipping; `applied`: whether the gradient was finite."""

    step: int
    start: int
    images: list[list[int]]
    losses: dict[str, float]
    grad_norm: float
    applied: bool
    first_bad_module: str

    def report(self) -> str:
        lines = [f"step {self.step}, taken again after those from step {self.start} on"]
        lines += [f"images of rank {rank}: {ids}" for rank, ids in enumerate(self.images)]
        lines += [f"{name}: {value:.9g}" for name, value in sorted(self.losses.items())]
        norm = f"{self.grad_norm:.9g}" if self.applied else "not finite, so the step is left out"
        bad = self.first_bad_module or "none"
        lines.append(f"gradient norm: {norm}")
        lines.append(f"first module with an output that is not finite: {bad}")
        return "\n".join(lines)


def replay_step(folder: Path, step: int, device: torch.device) -> Replayed:
    """Takes the steps from the newest checkpoint before `step` up to it again, the shares of all
    ranks one after the other.

    A run of one process is repeated exactly; of more, sums over ranks are rounded otherwise.
    Nothing is written. Raises `UserError` for what is no run folder or no step of it.
    """
    config, starts = _recorded(folder, step)
    config = replace(config, engine=replace(config.engine, loader_workers=0))
    dataset = open_dataset(config)
    config = replace(config, model=replace(config.model, num_classes=dataset.labels.num_classes))
    start_process_group(device)
    set_determinism(config.engine.deterministic)
    model, _ = initial_model(config, dataset.labels.names)
    epoch_steps = steps_per_epoch(dataset.train, config.optimizer.batch_size)
    state = new_state(config, model.to(device), epoch_steps)
    path = _checkpoint_before(folder, step)
    progress = load(state, path) if path else Progress()
    criterion = build_criterion(config.model).to(device)
    steps = _shares(config, dataset, range(progress.step, step), starts)
    for number, shares in enumerate(steps, progress.step):
        state.meter.restart()
        place = Place(folder, config, number + 1, progress.epoch, rank=0)
        with _first_bad_module(state.engine.module) as bad:
            applied = _take(state, criterion, place, shares, device)
    means = {name: float(total) for name, total in state.meter.sums.items()}
    images = [[i for batch in share for i in batch.image_ids] for share in shares]
    norm = state.updater.grad_norm
    return Replayed(step, progress.step, images, means, norm, applied, bad[0] if bad else "")


def _take(
    state: State,
    criterion: nn.Module,
    place: Place,
    shares: tuple[list[Batch], ...],
    device: torch.device,
) -> bool:
    """One step with the shares of all ranks; whether it was applied."""
    state.engine.train()
    boxes = sum(len(t["labels"]) for share in shares for batch in share for t in batch.targets)
    computed = []
    for rank, share in enumerate(shares):
        seed_step(place.config.seed, place.step - 1, rank)
        passes = len(share)
        num_boxes = torch.tensor(max(1.0, boxes), device=device) / (len(shares) * passes)
        for i, batch in enumerate(batch.to(device) for batch in share):
            check = LossCheck(place, state.engine.module, batch, num_boxes)
            outputs = state.engine(*batch.training_inputs(place.config.model))
            losses = check.losses(criterion, outputs)
            last = rank == len(shares) - 1 and i == passes - 1
            # Divided as in the step itself: a product with the inverse is rounded otherwise.
            parts = passes * len(shares)
            state.updater.backward(losses["loss"] / parts, last)
            computed.append((losses, parts))
    # The meter divides by the number of passes that it is given.
    state.meter.add(
        [{name: x * (len(computed) / n) for name, x in each.items()} for each, n in computed]
    )
    applied = state.updater.step()
    if applied and state.ema:
        state.ema.update(state.engine.module)
    return applied


def _shares(
    config: RunConfig, dataset: Dataset, steps: range, starts: dict[int, dict[str, Any]]
) -> Iterator[tuple[list[Batch], ...]]:
    """What the ranks read in each of the steps (numbered from 0). starts: of `_recorded`."""
    later = [first for first in starts if first > steps.start]
    bounds = [steps.start, *(first for first in later if first < steps.stop), steps.stop]
    for start, stop in itertools.pairwise(bounds):
        line = starts[max(first for first in starts if first <= start)]
        cuts = {name: line[name] for name in CUTS if name in line}  # older runs did not log them
        then = replace(config, engine=replace(config.engine, **cuts))
        given, world = (dataset.train, dataset.labels, then, range(start, stop)), line["world"]
        ranks = [training_steps(*given, rank, world, pin_memory=False) for rank in range(world)]
        yield from zip(*ranks, strict=True)


def _recorded(folder: Path, step: int) -> tuple[RunConfig, dict[int, dict[str, Any]]]:
    """The run's config, and the log's lines of its starts, in their order, by the steps after which
    they were: how many processes it went on by, and in what passes. Raises `UserError` where it has
    not got to `step`."""
    file, log = folder / "config.json", folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder: it has no config.json")
    config = RunConfig.from_json(json.dumps(read_identity(folder)["config"]))
    lines = read_lines(log) if log.exists() else []
    saved = [step_of(file)[0] for file in saved_steps(folder)]
    starts = {x["step"]: x for x in lines if x.get("event") == "start"}
    taken = [*(line["step"] for line in lines), *checkpoint_steps(folder), *saved]
    last = max(taken) if starts else 0
    if not 1 <= step <= last:
        expected = f"one of 1 to {last}, the steps that {folder} has taken" if last else (
            f"a run that has taken one, which {folder} has not"
        )  # fmt: skip
        raise UserError(f"step: got {step}, expected {expected}")
    return config, starts


def _checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest intact checkpoint of an earlier step; None: the run's beginning."""
    for earlier in reversed([s for s in checkpoint_steps(folder) if s < step]):
        path = checkpoint_path(folder, earlier)
        if check(path) is None:
            return path
    return None
