"""Takes optimizer steps with small engines, beside plain torch; for test_update.py.

python update_cases.py FOLDER: prints, as JSON, what came of each ZeRO stage and precision, and the
loss scale of a run that is resumed from a checkpoint in FOLDER. Runs in the processes of torchrun,
over gloo.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from engine_states import BATCH, Model, engine, settings
from torch import Tensor, nn

from model.parameters import parameter_groups
from pipeline.checkpoint import CheckpointWriter, State, load
from pipeline.checkpoint_store import Progress, checkpoint_path
from pipeline.data.labels import Labels
from pipeline.engine import AUTOCAST, start_process_group, stop_process_group
from pipeline.meter import Meter
from pipeline.training_state import gather
from pipeline.update import Updater
from pipeline.zero3 import own_part, weights_on_host

STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16", "fp16")
STEPS, PASSES, BAD_STEP = 8, 3, 5


def images(step: int) -> Tensor:
    return torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(step))


def loss_of(outputs: Tensor, step: int) -> Tensor:
    """Larger by the step, so that some gradients are clipped and others are not."""
    return (outputs.float() ** 2).mean() * step / 20


def ours(stage: int, precision: str) -> dict:
    """Ranks share the batch, each in passes of two images; one's loss is infinite at BAD_STEP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    trained = engine(stage, precision)
    updater = Updater(trained, settings(stage, precision))
    norms, rates, kept, scales = [], [], True, []
    for step in range(STEPS):
        before = [own_part(p).detach().clone() for p in trained.module.parameters()]
        mine = images(step).chunk(world)[rank].chunk(PASSES)
        for i, part in enumerate(mine):
            loss = loss_of(trained(part), step) / PASSES
            if step == BAD_STEP and rank == world - 1 and i == 1:
                loss = loss * math.inf
            updater.backward(loss, last=i == PASSES - 1)
        applied = updater.step()
        after = [own_part(p) for p in trained.module.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        kept &= applied == (step != BAD_STEP) and same != applied
        norms.append(updater.grad_norm)
        rates.append(trained.optimizer.param_groups[-1]["lr"])
        scales.append(updater.scale.value)
    weights = weights_on_host(trained.module, rank == 0)
    state = {"updates": gather(trained)["updates"], "scales": scales, "kept": kept}
    return {"weights": weights, "norms": norms, "rates": rates, **state}


def plain(precision: str, rates: list[float], lr: float, clip: float) -> dict:
    """The whole batch at once, by torch alone; in fp16 without a loss scale, in full precision."""
    torch.manual_seed(0)
    model = Model()
    groups = [{"params": ps} for ps in parameter_groups(model).values() if ps]
    base = [g["lr"] for g in engine(0, precision).optimizer.param_groups]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
    norms, norm = [], 0.0
    dtype = AUTOCAST.get(precision)
    factor = 1.0
    for step in range(STEPS):
        if step != BAD_STEP:
            for group, start in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = start * factor
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                outputs = model(images(step))
            loss_of(outputs, step).backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
        factor = rates[step] / base[-1]  # the schedule goes on at each step
        norms.append(norm)
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "norms": norms}


def resumed(folder: Path) -> list[dict]:
    """Each rank's loss scale after a resume from a step that followed an overflow."""
    config = settings(1, "fp16")

    def fresh() -> State:
        trained = engine(1, "fp16")
        return State(trained, Updater(trained, config), None, Meter(BATCH, torch.device("cpu")))

    state = fresh()
    for factor in (math.inf, 1.0):
        state.updater.backward(loss_of(state.engine(images(0)), 1) * factor, last=True)
        assert state.updater.step() == (factor == 1)
    labels = Labels((1,), ("thing",))
    writer = CheckpointWriter(folder, config, labels, frozenset(), *2 * (lambda *_: None,))
    writer.save(state, Progress(step=2))
    writer.wait()
    dist.barrier()
    again = fresh()
    load(again, checkpoint_path(folder, 2))
    scales: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(scales, asdict(again.updater.scale))
    return scales


def main(folder: Path) -> None:
    rank, _ = start_process_group(torch.device("cpu"))
    assert "mlflow" not in sys.modules  # by way of DeepSpeed: seconds of each start
    report = {}
    for stage in STAGES:
        for precision in PRECISIONS:
            mine = ours(stage, precision)
            beside = plain(precision, mine["rates"], 2e-4, 0.1)
            theirs = beside["weights"]
            pairs = list(zip(mine["norms"], beside["norms"], strict=True))
            moved = engine(0, "fp32").module.state_dict()
            if rank:
                continue
            report[f"{stage}-{precision}"] = {
                # In units of the way that the weights went.
                "weights": max(
                    float((mine["weights"][n] - theirs[n]).norm() / (theirs[n] - moved[n]).norm())
                    for n in theirs
                    if not n.startswith("frozen")
                ),
                "norms": [a / b - 1 for a, b in pairs if b],
                "clipped": [norm > 0.1 for norm in beside["norms"]],
                **{key: mine[key] for key in ("updates", "scales", "kept", "rates")},
            }
    scales = resumed(folder)
    if rank == 0:
        print(json.dumps({**report, "resumed": scales}))
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
