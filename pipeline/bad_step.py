"""A loss that is not finite: found at its own step, told in one line, kept for replay.

A bad step lies in the run folder as `non_finite/step-…-rank-….pt`, data only: the batch, the
generators' states and the weights before the step. `python -m pipeline replay FILE` runs it again.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import torch_file
from pipeline.config import RunConfig
from pipeline.data.batch import Batch
from pipeline.on_host import OnHost
from pipeline.zero3 import is_partitioned, own_part, weights_on_host, whole_shape

MOST_NAMES = 6
MOST_FILES = 10  # of saved steps in a run folder, beyond those of a row; each holds the weights


@dataclass(frozen=True)
class Place:
    """Where in a run a step is taken."""

    folder: Path
    config: RunConfig
    step: int
    """The optimizer step, from 1."""
    epoch: int
    rank: int
    skipped: int = 0
    """Steps in a row that were left out just before and count."""


class LossCheck:
    """One forward pass whose loss should be finite; made just before it, for the generators.

    Costs no wait of its own on a GPU: predictions that are not finite make the matcher raise, on
    costs it reads anyway, and the loss is read back while backward is being queued.
    """

    def __init__(self, place: Place, model: nn.Module, batch: Batch, num_boxes: Tensor) -> None:
        self.place, self.model, self.batch, self.num_boxes = place, model, batch, num_boxes
        self.generators = generator_states(batch.images.device)
        self.outputs: dict[str, Any] = {}
        self.computed: dict[str, Tensor] = {}
        self.refused = ""
        self.loss: OnHost | None = None
        self.weights: dict[str, Tensor] = {}  # whole, where those of the model are not

    def losses(self, criterion: nn.Module, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """`criterion` of the outputs. Where the matcher refuses them: a `loss` of NaN, whose
        gradient tells the other ranks, so that none waits for this one."""
        self.outputs = outputs
        try:
            self.computed = criterion(outputs, self.batch.targets, self.num_boxes)
        except FloatingPointError as error:
            self.refused = str(error)
            parts = [x.float().sum() for x in predictions(outputs).values()]
            return {"loss": torch.stack(parts).sum() * math.nan}
        self.loss = OnHost(self.computed["loss"].detach())
        return self.computed

    def problem(self) -> str:
        """What is wrong with the loss; empty where it is finite. Called while the weights are still
        those of the pass (collective where they are partitioned)."""
        found = self._own_problem()
        if is_partitioned(self.model):
            bad = torch.tensor(float(bool(found)), device=self.batch.images.device)
            dist.all_reduce(bad)
            if bad:  # now, because only the ranks that found one call `save`
                self.weights = weights_on_host(self.model, wanted=bool(found))
        return found

    def _own_problem(self) -> str:
        if self.loss is None:
            return self.refused
        loss = self.loss.read().item()
        return "" if math.isfinite(loss) else f"the loss is {loss}"

    def save(self) -> str:
        """Saves the pass as it was, after `problem` has found one, and returns a line that names
        step, rank and every tensor that is not finite."""
        place, weights = self.place, self.weights or weights_on_host(self.model, wanted=True)
        parameters = {name: weights[name] for name, _ in self.model.named_parameters()}
        found = _describe(parameters, self.batch, self.outputs, self.computed)
        said = (
            f"step {place.step}, rank {place.rank}: {self._own_problem()}; not finite: {found}; "
            f"images {self.batch.image_ids}"
        )
        file = place.folder / "non_finite" / f"step-{place.step:08d}-rank-{place.rank}.pt"
        message = f"{said}; saved, to be run again by: python -m pipeline replay {file}"
        content = {
            "message": message,
            "config": place.config.to_json(),
            "step": place.step,
            "epoch": place.epoch,
            "rank": place.rank,
            "generators": self.generators,
            "batch": vars(self.batch.to(torch.device("cpu"))),
            "num_boxes": self.num_boxes.cpu(),
            "losses": {name: x.detach().cpu() for name, x in self.computed.items()},
            "model": weights,
        }
        try:
            file.parent.mkdir(exist_ok=True)
            if not make_room(place):
                why = f"{file.parent} has {MOST_FILES} files, some of this step"
                return f"{said}; not saved, as {why}"
            torch_file.save(content, file)
        except OSError as error:  # other ranks wait for this one to say what it found
            with suppress(OSError):
                file.unlink()
            return f"{said}; not saved, as {file} cannot be written: {error.strerror}"
        return message


def saved_steps(folder: Path) -> list[Path]:
    """The bad steps that were saved in a run folder, by step and rank."""
    return sorted((folder / "non_finite").glob("step-[0-9]*-rank-[0-9]*.pt"), key=step_of)


def step_of(file: Path) -> tuple[int, int]:
    """Step and rank of a bad step, by its file's name."""
    _, step, _, rank = file.stem.split("-")
    return int(step), int(rank)


def make_room(place: Place) -> bool:
    """Removes the oldest bad steps, but none of the row that the present one is in, until there is
    room for another file. Where there is none, whether this step has no file yet: the step at which
    a run stops is always saved by a rank."""
    files = saved_steps(place.folder)
    row = range(place.step - place.skipped, place.step + 1)
    old = sorted((f for f in files if step_of(f)[0] not in row), key=_time_of_writing)
    too_many = len(files) + 1 - MOST_FILES
    for file in old[: max(0, too_many)]:
        file.unlink(missing_ok=True)
    return too_many <= len(old) or not any(step_of(file)[0] == place.step for file in files)


def _time_of_writing(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another rank has removed it
        return 0.0


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that a forward pass on `device` draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def require_finite_weights(model: nn.Module, step: int) -> None:
    """To be called before a checkpoint, so that it is one to go on from. Raises
    `FloatingPointError` naming the parameters that are not finite after `step`."""
    named = dict(model.named_parameters())
    counts = torch.stack([_not_finite(own_part(p)) for p in named.values()])
    if is_partitioned(model):
        dist.all_reduce(counts)
    sizes = {name: whole_shape(p).numel() for name, p in named.items()}
    found = _named("parameters", dict(zip(named, counts.tolist(), strict=True)), sizes)
    if found:
        raise FloatingPointError(
            f"after step {step}, whose loss was finite, these are not: {found}; no checkpoint of "
            f"them is written, the one before is intact"
        )


def describe(
    model: nn.Module, batch: Batch, outputs: dict[str, Any], losses: dict[str, Tensor]
) -> str:
    """The tensors of a step that are not finite, with how many numbers in each."""
    return _describe(dict(model.named_parameters()), batch, outputs, losses)


def _describe(
    parameters: dict[str, Tensor],
    batch: Batch,
    outputs: dict[str, Any],
    losses: dict[str, Tensor],
) -> str:
    inputs = {"images": batch.normalized_images()}
    inputs |= {f"boxes of image {i}": t["boxes"] for i, t in enumerate(batch.targets)}
    kinds: dict[str, dict[str, Tensor]] = {
        "inputs": inputs,
        "parameters": parameters,
        "outputs": predictions(outputs),
        "losses": losses,
    }
    parts = [_names(kind, tensors) for kind, tensors in kinds.items()]
    return "; ".join(part for part in parts if part) or "no tensor"


def predictions(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The class and box predictions of every layer, by name."""
    layers = {"_enc": outputs.get("enc_outputs", {})}
    for queries in (outputs, *outputs.get("groups", [])):
        ending = f"_{queries['group'].name}" if "group" in queries else ""
        earlier = enumerate(queries.get("aux_outputs", []))
        layers |= {f"_{i}{ending}": layer for i, layer in earlier} | {ending: queries}
    return {
        name + suffix: layer[name]
        for suffix, layer in layers.items()
        for name in ("pred_logits", "pred_boxes")
        if name in layer
    }


def _names(kind: str, tensors: dict[str, Tensor]) -> str:
    counts = {name: int(_not_finite(x)) for name, x in tensors.items()}
    return _named(kind, counts, {name: x.numel() for name, x in tensors.items()})


def _not_finite(x: Tensor) -> Tensor:
    return (~x.detach().isfinite()).sum()


def _named(kind: str, counts: dict[str, int], sizes: dict[str, int]) -> str:
    bad = [f"{name} ({n} of {sizes[name]})" for name, n in counts.items() if n]
    if not bad:
        return ""
    rest = [f"and {len(bad) - MOST_NAMES} more"] if len(bad) > MOST_NAMES else []
    return f"{kind} {', '.join(bad[:MOST_NAMES] + rest)}"
