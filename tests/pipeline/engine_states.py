"""Trains small engines in every ZeRO stage and precision, for test_training_state.py.

python engine_states.py whole FOLDER: 6 steps, the state saved, 6 more steps, the end saved; then
what `rest` does.
python engine_states.py rest FOLDER: the 6 steps from the saved state in a new engine; prints, as
JSON, how far each end is from the saved one.
python engine_states.py alone FOLDER: prints how far the chain's end is from that of an engine which
trained alone throughout. All three add links to the chain: 3 steps in each of CHAIN's stages with
as many processes, each from the state that the one before has saved.
Runs in the processes of torchrun, over gloo.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipeline.engine
from pipeline.config import RunConfig
from pipeline.engine import build_engine, start_process_group, stop_process_group
from pipeline.recipes import recipe
from pipeline.training_state import gather, restore
from pipeline.update import Updater
from pipeline.zero3 import weights_on_host

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
BATCH, HALF, END = 12, 6, 12
CHAIN = {2: (1, 3), 3: (2, 3), 1: (0,)}  # world size: stages
LINK = 3
pipeline.engine.KEPT_WHOLE = 0  # else stage 3 would cut none of so small parameters


class Model(nn.Module):
    """A parameter group for each rate of the trainer; sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(13, 17)
        self.middle = nn.Linear(17, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.sampling_offsets = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.sampling_offsets(self.frozen(self.middle(self.backbone(x).relu())))


def settings(stage: int, precision: str) -> RunConfig:
    config = recipe("demo")
    return replace(
        config,
        engine=replace(config.engine, zero_stage=stage, precision=precision, device="cpu"),
        optimizer=replace(config.optimizer, batch_size=BATCH),
    )


def engine(stage: int, precision: str):
    torch.manual_seed(0)
    return build_engine(Model(), settings(stage, precision), 3)


def train(engine, steps: range) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    updater = Updater(engine, settings(0, "fp32"))  # clips in every stage
    for step in steps:
        images = torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(step))
        updater.backward((engine(images.chunk(world)[rank]) ** 2).mean(), last=True)
        assert updater.step()


def snapshot(engine) -> dict:
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    return {
        "training": gather(engine),
        "model": weights_on_host(engine.module, dist.get_rank() == 0),
        "rates": rates,
    }


def distance(one: dict, other: dict) -> dict:
    """The largest difference over the largest value, of weights and of moments; exact equality."""
    pairs = {"model": (one["model"], other["model"])}
    for key in ("exp_avg", "exp_avg_sq"):
        pairs[key] = tuple(
            {name: moments[key] for name, moments in state["training"]["moments"].items()}
            for state in (one, other)
        )
    found = {}
    for key, (mine, theirs) in pairs.items():
        assert mine.keys() == theirs.keys()
        scale = max(float(value.abs().max()) for value in theirs.values())
        found[key] = max(float((mine[n] - theirs[n]).abs().max()) for n in mine) / scale
    found["same_counts"] = (
        one["rates"] == other["rates"]
        and one["training"]["updates"] == other["training"]["updates"]
    )
    return found


def states(mode: str, folder: Path) -> dict:
    """How far the end after a restored state is from the one that was saved, for each case."""
    found, rank = {}, dist.get_rank()
    for stage, precision in CASES:
        trained, name = engine(stage, precision), f"{stage}-{precision}"
        if mode == "whole":
            train(trained, range(HALF))
            half = snapshot(trained)
            train(trained, range(HALF, END))
            end = snapshot(trained)
            if rank == 0:
                torch.save(half, folder / f"{name}-half.pt")
                torch.save(end, folder / f"{name}-end.pt")
            dist.barrier()
            trained = engine(stage, precision)
        half = torch.load(folder / f"{name}-half.pt", weights_only=True)
        restore(trained, half["training"], half["model"], HALF)
        train(trained, range(HALF, END))
        end = snapshot(trained)
        if rank == 0:
            whole = torch.load(folder / f"{name}-end.pt", weights_only=True)
            found[name] = distance(end, whole)
    return found


def chain(folder: Path) -> dict:
    """How far each restored engine of this world size is from the state that was saved."""
    found, file = {}, folder / "chain.pt"
    for stage in CHAIN[dist.get_world_size()]:
        trained, done = engine(stage, "fp32"), 0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            done = saved["done"]
            restore(trained, saved["training"], saved["model"], done)
            restored = snapshot(trained)
            if dist.get_rank() == 0:
                found[f"{stage} on {dist.get_world_size()}"] = distance(restored, saved)
        train(trained, range(done, done + LINK))
        now = {**snapshot(trained), "done": done + LINK}
        if dist.get_rank() == 0:
            torch.save(now, file)
        dist.barrier()
    return found


def from_the_chains_end(folder: Path) -> dict:
    """How far it is from the end of as many steps of one engine alone."""
    ended = torch.load(folder / "chain.pt", weights_only=True)
    whole = engine(0, "fp32")
    train(whole, range(ended["done"]))
    return distance(ended, snapshot(whole))


def main(mode: str, folder: Path) -> None:
    rank, _ = start_process_group(torch.device("cpu"))
    report = {"chain": chain(folder)}
    if mode == "alone":
        report["end"] = from_the_chains_end(folder)
    else:
        report |= states(mode, folder)
    if rank == 0:
        print(json.dumps(report))
    stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
