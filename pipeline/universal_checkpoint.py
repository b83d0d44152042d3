"""A checkpoint of ours as a folder that programs of DeepSpeed's own go on from: its universal
format, in ZeRO stages 1, 2 and 3, on any number of processes.

What its readers take (0.19.8) is told in docs/log.md, what such a program must do besides in
docs/training.md. Nothing here imports DeepSpeed, and there is no code in what is written.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import torch_file
from pipeline.checkpoint_store import (
    Progress,
    check,
    checkpoint_path,
    load_model,
    load_progress,
    load_training,
)
from pipeline.errors import UserError
from pipeline.training_state import MOMENTS

DEEPSPEED = "0.19.8"  # whose readers this was written for; they ask for a version


def write_universal(checkpoint: Path, output: Path) -> Progress:
    """Writes the folder `output`, which must be new, and returns how far the training was.

    checkpoint: a run folder (its best checkpoint, else its newest) or a checkpoint in it. The
    weights are those that training goes on with; their moving average, where there is one, is
    among what DeepSpeed calls the client's state. Raises `UserError` for an `output` that is there
    already, and for a checkpoint that is not whole; nothing is left behind then, nor where the disk
    fails (`OSError`).
    """
    if output.exists():
        raise UserError(f"--output: {str(output)!r} exists already, expected a new folder")
    if not output.parent.is_dir():
        raise UserError(f"--output: folder {str(output.parent)!r} does not exist")
    content = load_model(checkpoint)
    folder = _folder(checkpoint, content)
    if problem := check(folder):
        raise UserError(
            f"{checkpoint} is not a whole checkpoint: {problem}; give a run folder, or a step-… "
            f"folder in its checkpoints/"
        )
    progress, training = load_progress(folder), load_training(folder)
    weights = training.get("weights", content["model"])
    if problem := _misfit(training, weights):
        raise UserError(
            f"{folder}/training.pt does not fit its model.pt: {problem}; give another checkpoint"
        )
    shared = _shared(content, training, progress)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".universal-") as aside:
        made = Path(aside) / output.name
        tag = f"global_step{progress.step}"
        _write_parameters(made / tag / "zero", weights, training)
        torch_file.save({**shared, "module": weights}, made / tag / "mp_rank_00_model_states.pt")
        # Stage 3 looks for its own, and reads no weights from it.
        torch_file.save(shared, made / tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        (made / "latest_universal").write_text(tag, encoding="utf-8")
        os.replace(made, output)
    return progress


def _folder(checkpoint: Path, content: dict[str, Any]) -> Path:
    """The checkpoint's folder, of what `load_model` has read."""
    if (checkpoint / "checkpoints").is_dir():
        return checkpoint_path(checkpoint, content["progress"]["step"])
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def _misfit(training: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """What keeps the optimizer's state from being that of the weights; empty where it is."""
    moments = training.get("moments")
    if not moments or type(training.get("updates")) is not int:
        return "it has no state of an optimizer"
    for name, pair in moments.items():
        if name not in weights or "/" in name:  # names become folders
            return f"it has moments of {name!r:.80}, which is none of the weights"
        if {key: value.shape for key, value in pair.items()} != dict.fromkeys(
            MOMENTS, weights[name].shape
        ):
            return f"moments of {name} are missing, or have another shape than its weights"
    return ""


def _shared(
    content: dict[str, Any], training: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """What every stage reads beside the parameters. Keys that DeepSpeed does not know it returns
    from `load_checkpoint` as the client's state."""
    shared = {
        "ds_version": DEEPSPEED,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": progress.step,
        "skipped_steps": progress.step - training["updates"],
        # Where a schedule is: torch's by the first three, DeepSpeed's own by the last.
        "lr_scheduler": {
            "last_epoch": progress.step,
            "_step_count": progress.step + 1,
            "lr_lambdas": [],
            "last_batch_iteration": progress.step - 1,
        },
        "config": content["config"],
        "labels": content["labels"],
    }
    if "weights" in training:
        shared |= {"ema": content["model"], "ema_updates": training["ema_updates"]}
    return shared


def _write_parameters(folder: Path, weights: dict[str, Tensor], training: dict[str, Any]) -> None:
    step = torch.tensor(float(training["updates"]))  # as torch's AdamW counts
    for name, moments in training["moments"].items():
        own = folder / name
        own.mkdir(parents=True)
        parts = {"fp32": weights[name], **{key: moments[key] for key in MOMENTS}}
        for key, value in parts.items():
            # Stage 3 lays it flat by view().
            torch_file.save({"param": value.contiguous(), "cat_dim": 0}, own / f"{key}.pt")
        torch_file.save(step, own / "step.pt")
    # Rates, decays and betas are left to the program's own optimizer: stage 3 would give every
    # group the first one's. Stages 1 and 2 load no more groups than are listed, and no program has
    # more than parameters.
    groups: list[dict[str, Any]] = [{"params": []} for _ in training["moments"]]
    stage_3 = {"state": {0: {"step": step}}, "param_groups": groups}
    content = {"ds_version": DEEPSPEED, "param_groups": groups, "optimizer_state_dict": stage_3}
    torch_file.save(content, folder / "optimizer_state.pt")
