"""One process of two that take a step, and then evaluate, together; for test_step.py.

torchrun step_cases.py SHARDS FOLDER: prints, as JSON, on rank 0 how far the step's gradients and
losses are from those of the whole batch, and on each rank what the evaluation says.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.checkpoint_store import Progress
from pipeline.config import RunConfig
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet
from pipeline.engine import start_process_group, stop_process_group
from pipeline.evaluate import detect
from pipeline.recipes import recipe
from pipeline.run import Run, new_state
from pipeline.step import take_step
from pipeline.stop import StopRequest
from pipeline.training_state import gather
from tests.pipeline.test_family_engine import batch, lively, small

CPU = torch.device("cpu")
METHODS = ("dab_deformable_detr_r50", "smca_detr_r50")
COUNTS = (3, 0, 1, 2, 0, 0, 0, 0)  # boxes of each image: the second rank has none
PASS = 2  # images
FIRST_MOMENT = 0.1  # of AdamW, 1 - beta_1: the share of the first gradient in it


def settings(name: str) -> RunConfig:
    config = small(name)
    optimizer = replace(config.optimizer, batch_size=len(COUNTS), clip_norm=0.0)
    return replace(config, optimizer=optimizer, engine=replace(config.engine, micro_batch=PASS))


def a_run(config: RunConfig, folder: Path) -> Run:
    """Of what a step needs, and nothing else."""
    other: dict[str, Any] = dict.fromkeys(("dataset", "log", "checkpoints", "truth"))
    return Run(
        config=config, folder=folder, state=new_state(config, lively(config).double(), 5.0),
        criterion=build_criterion(config.model), device=CPU, request=StopRequest(), initial="",
        steps_per_epoch=5.0, rank=dist.get_rank(), world=dist.get_world_size(), **other,
    )  # fmt: skip


def together(name: str, folder: Path) -> tuple[dict, dict]:
    """Losses and gradients of a step that the ranks take together; the latter on rank 0."""
    run = a_run(settings(name), folder)
    share = len(COUNTS) // run.world
    starts = range(run.rank * share, (run.rank + 1) * share, PASS)
    outcome = take_step(run, Progress(), [batch(COUNTS[i : i + PASS], i) for i in starts], False)
    assert not outcome.skipped
    losses = {key: x for key, x in run.state.meter.flush().items() if key.startswith("loss")}
    moments = gather(run.state.engine)["moments"]
    return losses, {key: x["exp_avg"].double() / FIRST_MOMENT for key, x in moments.items()}


def alone(name: str) -> tuple[dict, dict]:
    """The same of the whole batch at once, by autograd alone."""
    config = settings(name)
    model, whole = lively(config).double(), batch(COUNTS)
    outputs = model(*whole.training_inputs(config.model))
    boxes = torch.tensor(float(sum(COUNTS)))
    losses = build_criterion(config.model)(outputs, whole.targets, boxes)
    losses["loss"].backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {key: x.item() for key, x in losses.items()}, gradients


def distance(name: str, folder: Path) -> dict[str, float]:
    losses, gradients = together(name, folder)
    if dist.get_rank():
        return {}
    expected, whole = alone(name)
    assert losses.keys() == expected.keys()
    unused = {key for key, x in gradients.items() if key not in whole}
    assert not any(gradients[key].any() for key in unused)
    largest = max(float(x.norm()) for x in whole.values())
    return {
        "loss": max(abs(losses[key] / x - 1) for key, x in expected.items() if x),
        "gradient": max(
            float((gradients[key] - x).norm() / (x.norm() + 1e-6 * largest))
            for key, x in whole.items()
        ),
    }


def refused(shards: Path) -> str:
    """What an evaluation says where rank 1's first images alone have predictions of NaN."""
    val, config = ShardSet(shards / "val"), recipe("demo")
    config = replace(config, engine=replace(config.engine, evaluation_batch=2))
    model = build_model(config.model)

    def spoil(_module: Any, _inputs: Any, outputs: dict[str, Any]) -> None:
        outputs["pred_boxes"][0, 0, 0] = torch.nan
        hook.remove()

    if dist.get_rank() == 1:
        hook = model.register_forward_hook(spoil)
    labels = build_labels(val.categories, "contiguous")
    place = (dist.get_rank(), dist.get_world_size())
    try:
        detect(model, val, labels, config, CPU, *place, dist.barrier)
    except FloatingPointError as error:
        return str(error)
    return ""


def main(shards: Path, folder: Path) -> None:
    rank, _ = start_process_group(CPU, timeout=60.0)
    report = {name: distance(name, folder) for name in METHODS}
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, refused(shards))
    if rank == 0:
        print(json.dumps({**report, "refused": said}))
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
