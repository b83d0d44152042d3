"""One optimizer step: the passes of a global batch, what all ranks have to agree on, the update."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.bad_step import LossCheck, Place
from pipeline.checkpoint_store import Progress
from pipeline.data.batch import Batch
from pipeline.engine import naming_memory, seed_step
from pipeline.on_host import OnHost
from pipeline.run import Run


@dataclass(frozen=True)
class Outcome:
    """`skipped`: steps in a row that were left out, up to this one. `why`: of this one, if it was;
    `save` and `stop`: what all ranks are to do now."""

    skipped: int
    why: str
    save: bool
    stop: bool


def take_step(run: Run, progress: Progress, micro_batches: list[Batch], save: bool) -> Outcome:
    """Trains on this rank's micro-batches of the global batch after `progress` (collective).

    `save` on rank 0 and a stop request on any rank reach all of them with this step. Raises
    `FloatingPointError` on all ranks, and logs it, where it is the last of
    `engine.most_skipped_steps` in a row whose loss or gradient is not finite.
    """
    seed_step(run.config.seed, progress.step, run.rank)
    passes = len(micro_batches)
    boxes = sum(len(t["labels"]) for batch in micro_batches for t in batch.targets)
    total = summed([boxes, save and run.rank == 0, run.request.asked], run.device)
    asked = OnHost(total[1:])
    # The engine averages over ranks, and here is averaged over passes. This normaliser makes that
    # the loss of the whole global batch, divided by its number of boxes.
    num_boxes = total[0].clamp(min=1) / (run.world * passes)
    place = Place(
        run.folder, run.config, progress.step + 1, progress.epoch, run.rank, progress.skipped
    )
    checks, computed = [], []
    for i, batch in enumerate(micro_batches):
        check = LossCheck(place, run.state.engine.module, batch, num_boxes)
        with naming_memory(tuple(batch.images.shape)):
            outputs = run.state.engine(*batch.training_inputs(run.config.model))
            losses = check.losses(run.criterion, outputs)
            run.state.updater.backward(losses["loss"] / passes, last=i == passes - 1)
        checks.append(check)
        computed.append(losses)
    said = [check.save() for check in checks if check.problem()]
    scale = run.state.updater.scale.value
    counts = run.state.updater.counts_if_skipped()
    skipped, why = 0, ""
    if run.state.updater.step():
        run.state.meter.add(computed)
        if run.state.ema:
            run.state.ema.update(run.state.engine.module)
    else:
        run.state.meter.skip()
        skipped = progress.skipped + counts
        why = reason(said, progress.step + 1, scale, run.state.updater.scale.dynamic)
        if skipped >= run.config.engine.most_skipped_steps:
            if run.rank == 0:
                step = progress.step + 1
                epoch = step / run.steps_per_epoch
                run.log.write("event", step, epoch, event="diverged", text=why)
            raise FloatingPointError(why)
    wants_save, wants_stop = asked.read().tolist()
    return Outcome(skipped, why, wants_save > 0, wants_stop > 0)


def summed(numbers: list[float], device: torch.device) -> Tensor:
    """Each number's sum over ranks, float32 (collective)."""
    # Filled on the device: a copy from the host would wait for the step before.
    each = [torch.full((), float(n), device=device) for n in numbers]
    total = torch.stack(each)
    dist.all_reduce(total)
    return total


def reason(said: list[str], step: int, scale: float, dynamic: bool) -> str:
    """Why a step was left out, as the ranks that know say it (collective)."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, said)
    messages = [message for of_rank in found for message in of_rank]
    if messages:
        return "; ".join(messages)
    gradient = f"step {step}: the loss is finite, and the gradient is not"
    return f"{gradient}, at loss scale {scale:g}" if dynamic else gradient
