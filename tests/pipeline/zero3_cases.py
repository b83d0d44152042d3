"""Trains a small detector in ZeRO stage 3, for test_zero3.py.

python zero3_cases.py FOLDER: prints, as JSON, what rank 0 found. Runs in two processes of torchrun,
over gloo.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipeline.engine
from model.criterion import build_criterion
from model.detr import build_model
from pipeline.bad_step import LossCheck, Place, require_finite_weights
from pipeline.checkpoint import State
from pipeline.config import RunConfig
from pipeline.data.augment import Example
from pipeline.data.batch import Batch, collate
from pipeline.ema import Ema
from pipeline.engine import start_process_group, stop_process_group
from pipeline.recipes import recipe
from pipeline.run import new_state
from pipeline.zero3 import own_part, weights_on_host

STEPS, PASSES, EMPTY_STEP = 4, 2, 2
LINEAR = torch.nn.functional.linear


def settings(stage: int) -> RunConfig:
    # One without a choice among proposals, which rounding decides while all are alike.
    config = recipe("deformable_detr_r50_refine_demo")
    model = replace(config.model, encoder_layers=2, decoder_layers=2, dropout=0.1)
    return replace(
        config,
        model=replace(model, activation_checkpointing=True),
        engine=replace(config.engine, zero_stage=stage, precision="fp32", device="cpu"),
        optimizer=replace(config.optimizer, batch_size=4, ema_decay=0.9, lr=5e-4),
    )


def batch(seed: int, objects: int) -> Batch:
    """An image of noise, with up to two objects."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=random)
    boxes = torch.tensor([[4.0, 5, 30, 40], [20, 10, 60, 50]])[:objects]
    example = Example(image, boxes, torch.tensor([1, 2])[:objects])
    return collate([example], [{"id": seed, "height": 64, "width": 96}])


def new(stage: int) -> State:
    torch.manual_seed(0)
    config = settings(stage)
    state = new_state(config, build_model(config.model), 4)
    state.engine.train()
    return state


def take(state: State, check: LossCheck, criterion: nn.Module, part: float, last: bool) -> Tensor:
    outputs = state.engine(check.batch.normalized_images(), check.batch.padding_mask)
    loss = check.losses(criterion, outputs)["loss"]
    state.updater.backward(loss * part, last)
    return loss.detach()


def train(state: State, folder: Path) -> dict:
    """Rank 1 has no object in any image, at EMPTY_STEP neither has rank 0."""
    rank = dist.get_rank()
    config = settings(3)
    criterion = build_criterion(config.model)
    mirror = build_model(config.model)  # of the weights, whole on rank 0
    follow(mirror, state)
    whole = Ema(mirror, 0.9)
    losses, sizes = [], []
    for step in range(STEPS):
        for i in range(PASSES):
            seed = 100 * step + 10 * rank + i
            torch.manual_seed(seed)
            given = batch(seed, 0 if rank or step == EMPTY_STEP else 2)
            place = Place(folder, config, step + 1, 0, rank)
            check = LossCheck(place, state.engine.module, given, torch.tensor(1.0))
            losses.append(float(take(state, check, criterion, 1 / PASSES, i == PASSES - 1)))
            assert not check.problem()
        assert state.updater.step()
        state.ema.update(state.engine.module)
        sizes.append(sum(p.numel() for p in state.engine.module.parameters()))
        follow(mirror, state)
        whole.update(mirror)
    averages = weights_on_host(state.ema.module, rank == 0)
    found = {"losses": losses, "norm": state.updater.grad_norm, "between": sizes}
    found["same_average"] = all(
        torch.equal(averages[name], value)
        for name, value in whole.module.state_dict().items()
        if rank == 0
    )
    return found


def follow(mirror: nn.Module, state: State) -> None:
    weights = weights_on_host(state.engine.module, dist.get_rank() == 0)
    if weights:
        mirror.load_state_dict(weights)


def parts(module: nn.Module) -> dict:
    sizes = [own_part(p).numel() for p in module.parameters()]
    wholes = [p.ds_numel for p in module.parameters()]
    each = torch.tensor(sizes)
    together = each.clone()
    dist.all_reduce(together)
    return {
        "sum": together.tolist() == wholes,
        "uneven": int((2 * each - torch.tensor(wholes)).abs().max()),
        "share": sum(sizes) / sum(wholes),
    }


def evaluated(state: State) -> dict:
    """Rank 0 alone runs what is evaluated, and the same weights in an ordinary model."""
    copy, weights = state.model, weights_on_host(state.kept, True)
    if dist.get_rank():
        return {}
    plain = build_model(settings(0).model)
    plain.load_state_dict(weights)
    given = batch(7, 2)
    with torch.no_grad():
        mine, theirs = (
            model.eval()(given.normalized_images(), given.padding_mask) for model in (copy, plain)
        )
    return {name: torch.equal(mine[name], theirs[name]) for name in ("pred_logits", "pred_boxes")}


def bad_pass(state: State, folder: Path) -> dict:
    """A pass whose loss is NaN on rank 1 alone, left out on both, and then a good one."""
    rank, config = dist.get_rank(), settings(3)
    criterion = build_criterion(config.model)
    before = weights_on_host(state.engine.module, True)
    applied, saved = [], 0
    for objects, value in [(1, float("nan")), (1, 0.5)]:
        torch.manual_seed(rank)
        given = batch(50 + rank, objects)
        if rank == 1:
            given.targets[0]["boxes"][0, 2] = value
        place = Place(folder, config, 12, 0, rank)
        check = LossCheck(place, state.engine.module, given, torch.tensor(1.0))
        take(state, check, criterion, 1.0, last=True)
        if check.problem():
            assert rank == 1
            assert "boxes of image 0 (1 of 4)" in check.save()
            saved += 1
        applied.append(state.updater.step())
        after = weights_on_host(state.engine.module, True)
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same != applied[-1]
    both = torch.tensor(saved)
    dist.all_reduce(both)
    return {"applied": applied, "saved": int(both)}


def poisoned(state: State) -> str:
    """What rank 0 says of a weight that is not finite in rank 1's part."""
    parameter = state.engine.module.encoder[0].norm.weight
    if dist.get_rank() == 1:
        own_part(parameter)[3:5] = float("inf")
    try:
        require_finite_weights(state.engine.module, 9)
    except FloatingPointError as error:
        return str(error)
    return ""


def cnn_losses(stage: int) -> list[float]:
    """Of a Faster R-CNN, over three steps on the same batch."""
    config = recipe("faster_rcnn_r50_fpn_demo")
    config = replace(config, engine=settings(stage).engine)
    torch.manual_seed(0)
    state = new_state(config, build_model(config.model), 3)
    state.engine.train()
    criterion = build_criterion(config.model)
    given, losses = batch(dist.get_rank(), 2), []
    for step in range(3):
        torch.manual_seed(step)
        outputs = state.engine(given.normalized_images(), given.padding_mask)
        loss = criterion(outputs, given.targets)["loss"]
        state.updater.backward(loss, last=True)
        assert state.updater.step()
        losses.append(float(loss))
    return losses


def main(folder: Path) -> None:
    rank, _ = start_process_group(torch.device("cpu"))
    default, pipeline.engine.KEPT_WHOLE = pipeline.engine.KEPT_WHOLE, 0
    state = new(3)
    report = {
        "apart": train(state, folder), "parts": parts(state.engine.module),
        "average_parts": sum(own_part(p).numel() for p in state.ema.module.parameters()),
        "average_kept": sum(p.numel() for p in state.ema.module.parameters()),
        "evaluated": evaluated(state), "bad": bad_pass(state, folder), "said": poisoned(state),
    }  # fmt: skip
    report["gathered"] = train(new(2), folder)
    report["cnn_apart"], report["cnn_gathered"] = cnn_losses(3), cnn_losses(2)
    pipeline.engine.KEPT_WHOLE = default
    state = new(3)
    report["some_whole"] = train(state, folder)
    counts = [p.ds_numel for p in state.engine.module.parameters()]
    report["small"] = sum(n for n in counts if n <= default)
    report["all"] = sum(counts)
    assert torch.nn.functional.linear is LINEAR  # DeepSpeed's default replaces it for good
    if rank == 0:
        print(json.dumps(report))
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
