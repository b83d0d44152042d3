"""The methods of the family in the trainer: batches in passes, and a run that goes on.

python test_family_engine.py SHARDS FOLDER: trains, goes on, and prints the steps of the starts.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.checkpoint_store import checkpoint_path, checkpoint_steps
from pipeline.config import RunConfig
from pipeline.data.augment import Example
from pipeline.data.batch import Batch, collate
from pipeline.engine import start_process_group, stop_process_group
from pipeline.recipes import recipe
from pipeline.train import train
from tests.pipeline.training_runs import ENVIRONMENT, ROOT, events, require_same_ends

METHODS = (
    "deformable_detr_r50_12ep", "conditional_detr_r50", "smca_detr_r50", "dab_detr_r50",
    "dn_dab_detr_r50", "dab_deformable_detr_r50", "dn_dab_deformable_detr_r50", "dino_r50_4scale",
    "anchor_detr_r50", "sam_detr_r50_smca", "sam_detr_r50_multiscale",
)  # fmt: skip
DENOISED = [name for name in METHODS if recipe(name).model.wants_targets]
RESUMED = "deformable_detr_r50_12ep"  # draws noise, has every kind of group and an average


def small(name: str, **changes: object) -> RunConfig:
    config = recipe(f"{name}_demo")
    model = replace(
        config.model, encoder_layers=1, decoder_layers=2, hidden_dim=32, feedforward_dim=32,
        num_queries=8, one_to_many_queries=8 * bool(config.model.one_to_many_queries),
        denoising_pairs=8 * bool(config.model.denoising_pairs), **changes,
    )  # fmt: skip
    return replace(
        config, model=model, engine=replace(config.engine, precision="fp32", device="cpu")
    )


def lively(config: RunConfig) -> nn.Module:
    """Off the start, where all proposals are alike and rounding would choose among them."""
    torch.manual_seed(0)
    model = build_model(config.model).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def batch(counts: tuple[int, ...], first: int = 0) -> Batch:
    """Images of noise of one size, with so many boxes each."""
    examples = []
    for index, count in enumerate(counts, first):
        random = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=random)
        low = 40 * torch.rand(count, 2, generator=random)
        size = 4 + 20 * torch.rand(count, 2, generator=random)
        labels = torch.randint(4, (count,), generator=random)
        examples.append(Example(image, torch.cat((low, low + size), dim=1), labels))
    return collate(examples, [{"id": i, "height": 64, "width": 96} for i in range(len(counts))])


def in_passes(
    name: str, counts: tuple[int, ...], passes: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients, in float64, of a batch that is cut as the trainer cuts it."""
    config = small(name, denoising_box_noise=0.0, denoising_label_noise=0.0)
    model, criterion = lively(config).double(), build_criterion(config.model)
    num_boxes = torch.tensor(max(1, sum(counts)) / passes)
    size, losses = len(counts) // passes, dict[str, float]()
    for start in range(0, len(counts), size):
        given = batch(counts[start : start + size], start)
        computed = criterion(model(*given.training_inputs(config.model)), given.targets, num_boxes)
        (computed["loss"] / passes).backward()
        for key, value in computed.items():
            losses[key] = losses.get(key, 0.0) + value.item() / passes
    return losses, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_passes_add_up_to_the_batch(name):
    """Denoising sees the emptier images of its pass by how many boxes the fullest has, so that its
    images here have as many each."""
    counts = (2, 2, 2, 2) if name in DENOISED else (3, 0, 1, 2)
    losses, gradients = in_passes(name, counts, 1)
    parts, summed = in_passes(name, counts, 2)
    assert parts == pytest.approx(losses, rel=1e-9, abs=1e-12)
    assert gradients.keys() == summed.keys()
    scale = max(float(x.abs().max()) for x in gradients.values())
    for key, value in gradients.items():
        torch.testing.assert_close(summed[key], value, rtol=1e-7, atol=1e-9 * scale, msg=key)


@pytest.mark.parametrize("name", DENOISED)
def test_how_a_batch_is_cut_concerns_the_denoising_queries_alone(name):
    losses, _ = in_passes(name, (3, 0, 1, 2), 1)
    parts, _ = in_passes(name, (3, 0, 1, 2), 2)
    others = {key for key in losses if not key.endswith("_dn") and key != "loss"}
    assert others < losses.keys() - {"loss"}
    for key in others:
        assert parts[key] == pytest.approx(losses[key], rel=1e-9), key


def resumed(shards: Path, folder: Path) -> list[int]:
    """Trains an epoch, takes back all after its first step, and goes on; the steps of both starts.
    Raises where the ends differ."""
    config = small(RESUMED, dropout=0.1)
    config = replace(
        config,
        data=replace(config.data, train=str(shards / "train"), val=str(shards / "val")),
        optimizer=replace(config.optimizer, batch_size=16, ema_decay=0.9),
        schedule=replace(config.schedule, epochs=1),
        engine=replace(
            config.engine, micro_batch=8, log_every=2, checkpoint_steps=1, keep_checkpoints=9
        ),
    )
    whole, killed = folder / "whole", folder / "killed"
    train(config, whole)
    shutil.copytree(whole, killed)
    for step in checkpoint_steps(killed)[1:]:
        shutil.rmtree(checkpoint_path(killed, step))
    train(config, killed)
    require_same_ends(killed, whole)
    return [line["step"] for line in events(killed, "start")]


def main(shards: Path, folder: Path) -> None:
    start_process_group(torch.device("cpu"))
    print(json.dumps(resumed(shards, folder)))
    stop_process_group()


@pytest.mark.chaos  # half a minute; test_denoising_training.py replays such a step
def test_a_run_with_denoising_goes_on_to_the_last_bit(drawn, tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(drawn.shards), str(tmp_path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
