"""Engines of DeepSpeed's own on what `pipeline.universal_checkpoint` wrote, for its test.

python universal_engines.py train FOLDER: a training of ours, of three groups and an average, leaves
a run in FOLDER/run and the universal folder in FOLDER/universal; then what `load` does.
python universal_engines.py load FOLDER: prints, as JSON, what plain engines of the ZeRO stages 1, 2
and 3 are after they have loaded it and after two steps more.
Runs in the processes of torchrun, over gloo.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_states import BATCH, Model, settings, train
from torch import Tensor

from pipeline.checkpoint import CheckpointWriter, State
from pipeline.checkpoint_store import Progress, checkpoint_path, load_model, load_training
from pipeline.data.labels import Labels
from pipeline.ema import Ema
from pipeline.engine import build_engine, start_process_group, stop_process_group
from pipeline.meter import Meter
from pipeline.training_state import MOMENTS, gather
from pipeline.universal_checkpoint import write_universal
from pipeline.update import Updater
from pipeline.zero3 import weights_on_host

UPDATES, STEP, MORE = 3, 5, 2
RATES = {"backbone": 1e-3, "middle": 1e-2, "sampling_offsets": 5e-3}
DECAYS = {"backbone": 0.1, "middle": 0.01, "sampling_offsets": 0.0}


def leave_a_run(folder: Path) -> None:
    """`UPDATES` in stage 1; the other steps of `STEP` were left out."""
    config = settings(1, "fp32")
    config = replace(config, optimizer=replace(config.optimizer, ema_decay=0.9, lr=1e-2))
    torch.manual_seed(0)
    model = Model()
    ema = Ema(model, 0.9)
    engine = build_engine(model, config, 3)
    for step in range(UPDATES):
        train(engine, range(step, step + 1))
        ema.update(engine.module)
    state = State(engine, Updater(engine, config), ema, Meter(BATCH, torch.device("cpu")))
    labels = Labels((1,), ("shape",))
    writer = CheckpointWriter(folder, config, labels, frozenset(), *2 * (lambda *_: None,))
    writer.save(state, Progress(STEP, 1))
    writer.wait()


def groups(model: Model) -> list[dict[str, Any]]:
    """A program's own parameter groups, one for each of the model's parts."""
    parts = {name: list(getattr(model, name).parameters()) for name in RATES}
    return [
        {"params": parts[name], "lr": RATES[name], "weight_decay": DECAYS[name]} for name in RATES
    ]


def program(stage: int, folder: Path, module: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What a DeepSpeed program has from the folder: its engine, and the client's state.

    module: the weights that the program has loaded by itself."""
    import deepspeed  # here, where `start_process_group` has imported it without MLflow

    torch.manual_seed(7)  # others
    model = Model()
    model.load_state_dict(module, strict=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups(model)),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": True},
        },
        dist_init_required=False,
    )
    _, client = engine.load_checkpoint(folder / "universal")
    return engine, client


def frozen(folder: Path) -> dict[str, Tensor]:
    """The weights of the folder that DeepSpeed leaves to the program."""
    tag = (folder / "universal" / "latest_universal").read_text()
    file = folder / "universal" / tag / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    return {name: value for name, value in module.items() if name.startswith("frozen.")}


def goes_on(engine: Any) -> None:
    """What a program must do besides, of which DeepSpeed's readers do nothing."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch would rather not be told the step
        engine.lr_scheduler.step(engine.global_steps)


def take(engine: Any, steps: int) -> None:
    for step in range(steps):
        engine.backward((engine(images(step)) ** 2).mean())
        engine.step()


def images(step: int) -> Tensor:
    """The same on every process, so that the mean gradient is the one of each."""
    return torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(100 + step))


def expected(folder: Path, steps: int) -> dict[str, dict[str, Tensor]]:
    """The same steps by torch alone, from what our checkpoint says."""
    path = checkpoint_path(folder / "run", STEP)
    training = load_training(path)
    model = Model()
    model.load_state_dict(training["weights"])
    optimizer = torch.optim.AdamW(groups(model))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {k: v.clone() for k, v in training["moments"][names[id(p)]].items()}
            optimizer.state[p] = {"step": torch.tensor(float(training["updates"])), **moments}
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate / (1 + STEP + step)
        (model(images(step)) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {"weights": {n: p.detach().clone() for n, p in model.state_dict().items()}}
    for key in MOMENTS:
        found[key] = {names[id(p)]: s[key] for p, s in optimizer.state.items()}
    return found


def measured(engine: Any) -> dict[str, dict[str, Tensor]]:
    training = gather(engine)
    found = {"weights": weights_on_host(engine.module, dist.get_rank() == 0)}
    for key in MOMENTS:
        found[key] = {name: pair[key] for name, pair in training["moments"].items()}
    return found


def differences(engine: Any, folder: Path, steps: int) -> dict[str, float]:
    """The largest difference over the largest value, by kind; of rank 0."""
    mine, theirs = measured(engine), expected(folder, steps)
    if dist.get_rank():
        return {}
    found = {}
    for kind, values in theirs.items():
        assert mine[kind].keys() == values.keys()
        scale = max(float(v.abs().max()) for v in values.values())
        found[kind] = max(float((mine[kind][n] - v).abs().max()) for n, v in values.items()) / scale
    return found


def counts(engine: Any) -> list[float]:
    return [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]


def rates(engine: Any) -> list[float]:
    return [group["lr"] for group in engine.optimizer.param_groups]


def as_a_program_should(stage: int, folder: Path) -> dict[str, Any]:
    engine, client = program(stage, folder, frozen(folder))
    average = load_model(checkpoint_path(folder / "run", STEP))["model"]
    found = {
        "at_once": differences(engine, folder, 0),
        "counts": counts(engine),
        "steps": {
            "global": engine.global_steps,
            "skipped": engine.skipped_steps,
            "schedule": engine.lr_scheduler.last_epoch,
        },
        "client": sorted(client),
        "same_average": client["ema_updates"] == UPDATES
        and client["ema"].keys() == average.keys()
        and all(torch.equal(client["ema"][name], value) for name, value in average.items()),
    }
    goes_on(engine)
    take(engine, MORE)
    found["then"] = differences(engine, folder, MORE)
    found["counts_then"] = counts(engine)
    return found


def left_alone(stage: int, folder: Path) -> dict[str, Any]:
    """What DeepSpeed's readers do by themselves, and what the counts are a step later."""
    engine, _ = program(stage, folder, {})
    read = weights_on_host(engine.module, True)
    found = {
        "reads_frozen": any(torch.equal(read[name], x) for name, x in frozen(folder).items()),
        "rates_alone": rates(engine),
        "rates_of_the_start": list(RATES.values()),
    }
    take(engine, 1)
    return {**found, "alone": counts(engine)}


def main(mode: str, folder: Path) -> None:
    rank, _ = start_process_group(torch.device("cpu"))
    if mode == "train":
        leave_a_run(folder / "run")
        if rank == 0:
            write_universal(folder / "run", folder / "universal")
        dist.barrier()
    report = {
        stage: {**as_a_program_should(stage, folder), **left_alone(stage, folder)}
        for stage in (1, 2, 3)
    }
    if rank == 0:
        print(json.dumps(report))
    stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
