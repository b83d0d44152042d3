"""A loss that is not finite: found before the optimizer's step, told, saved, and replayed."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.criterion import build_criterion
from model.detr import build_model
from pipeline.__main__ import COMMANDS
from pipeline.bad_step import LossCheck, Place, require_finite_weights
from pipeline.checkpoint_store import check, checkpoint_path, load_model, load_training
from pipeline.cli import main
from pipeline.data.augment import Example
from pipeline.data.batch import collate
from pipeline.data.labels import build_labels
from pipeline.data.shards import ShardSet
from pipeline.engine import AUTOCAST
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.replay import replay_saved
from pipeline.tracking import read_lines
from tests.pipeline.made_up_detector import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def a_batch():
    """Two images of noise with objects of classes 0 and 1."""
    random = torch.Generator().manual_seed(3)
    examples = []
    for height, width in [(64, 96), (80, 64)]:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=random)
        boxes = torch.tensor([[4.0, 5, 30, 40], [20, 10, 60, 50]])
        examples.append(Example(image, boxes, torch.tensor([0, 1])))
    records = [{"id": 31, "height": 64, "width": 96}, {"id": 32, "height": 80, "width": 64}]
    return collate(examples, records)


class Step:
    """A training step's forward pass and loss, as the trainer takes it."""

    def __init__(self, folder: Path, precision: str = "fp32", device: str = "cpu") -> None:
        config, self.device = recipe("demo"), torch.device(device)
        self.config = replace(
            config,
            model=replace(config.model, dropout=0.1),
            engine=replace(config.engine, precision=precision),
        )
        torch.manual_seed(0)
        self.model = build_model(self.config.model).train().to(self.device)
        self.place = Place(folder, self.config, step=12, epoch=1, rank=3)

    def take(self, batch) -> dict:
        batch = batch.to(self.device)
        torch.manual_seed(99)
        num_boxes = torch.tensor(3.0, device=self.device)
        check = LossCheck(self.place, self.model, batch, num_boxes)
        dtype = AUTOCAST.get(self.config.engine.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = self.model(batch.normalized_images(), batch.padding_mask)
        criterion = build_criterion(self.config.model).to(self.device)
        self.losses = check.losses(criterion, outputs)
        self.losses["loss"].backward()
        if check.problem():
            raise FloatingPointError(check.save())
        return self.losses


def poison(model, column: int) -> None:
    """The class column of the last decoder layer's head."""
    with torch.no_grad():
        model.heads.classes[-2].bias[column] = float("nan")


def saved_file(folder: Path) -> Path:
    return folder / "non_finite" / "step-00000012-rank-3.pt"


def test_a_finite_step_passes_and_writes_nothing(tmp_path):
    assert Step(tmp_path).take(a_batch())["loss"].isfinite()
    assert not list(tmp_path.iterdir())


def test_a_loss_that_the_matcher_does_not_see(tmp_path):
    """Column 3 belongs to no object, so all matching costs are finite."""
    step = Step(tmp_path)
    poison(step.model, 3)
    with pytest.raises(FloatingPointError) as caught:
        step.take(a_batch())
    message = str(caught.value)
    assert message.startswith("step 12, rank 3: the loss is nan; not finite: ")
    assert "parameters heads.classes.5.bias (1 of 4)" in message
    assert "outputs pred_logits (60 of 240)" in message
    assert "losses loss_ce (1 of 1), loss (1 of 1)" in message
    assert "inputs" not in message
    assert "images [31, 32]" in message
    assert str(saved_file(tmp_path)) in message
    assert "\n" not in message
    # In the order of the losses, all of them, as they were; and nothing moved without the step.
    losses, report = replay_saved(saved_file(tmp_path), CPU)
    assert losses.keys() == step.losses.keys()
    assert sum(not x.isfinite() for x in losses.values()) == 2
    for name, value in step.losses.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=0, atol=0, equal_nan=True)
    assert "output that is not finite: heads.classes.5 (Linear)" in report
    assert "loss: nan" in report


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_step_is_replayed_in_the_deterministic_mode_of_its_run(tmp_path, deterministic):
    step = Step(tmp_path)
    engine = replace(step.config.engine, deterministic=deterministic)
    step.place = replace(step.place, config=replace(step.config, engine=engine))
    poison(step.model, 3)
    with pytest.raises(FloatingPointError):
        step.take(a_batch())
    torch.use_deterministic_algorithms(not deterministic)
    try:
        replay_saved(saved_file(tmp_path), CPU)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_replayed_with_weights_that_lie_as_they_did(tmp_path, order, monkeypatch):
    """In a run of several processes they are contiguous, in one alone as the model wants them."""
    models = []

    def build(config):
        models.append(build_model(config))
        return models[-1]

    monkeypatch.setattr("pipeline.replay.build_model", build)
    step = Step(tmp_path)
    step.model.to(memory_format=order)
    poison(step.model, 3)
    with pytest.raises(FloatingPointError):
        step.take(a_batch())
    replay_saved(saved_file(tmp_path), CPU)
    strides = [p.stride() for p in step.model.parameters()]
    assert [p.stride() for p in models[0].parameters()] == strides


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_the_generator_is_restored_too(tmp_path, precision):
    step = Step(tmp_path, precision, "cuda")
    assert step.take(a_batch())["loss"].isfinite()
    poison(step.model, 3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan"):
        step.take(a_batch())
    losses, _ = replay_saved(saved_file(tmp_path), torch.device("cuda"))
    for name, value in step.losses.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-3, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions_that_the_matcher_refuses(tmp_path, precision):
    step = Step(tmp_path, precision)
    poison(step.model, 1)
    before = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match=r"matching cost.*pred_logits \(60\)"):
        step.take(a_batch())
    saved = torch.load(saved_file(tmp_path), weights_only=True)
    batch = a_batch()
    assert torch.equal(saved["batch"]["images"], batch.images)
    assert torch.equal(saved["batch"]["padding_mask"], batch.padding_mask)
    assert saved["batch"]["image_ids"] == [31, 32]
    for got, expected in zip(saved["batch"]["targets"], batch.targets, strict=True):
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (saved["step"], saved["epoch"], saved["rank"]) == (12, 1, 3)
    assert not torch.equal(saved["generators"]["cpu"], before)
    losses, report = replay_saved(saved_file(tmp_path), CPU)
    assert losses == {}
    assert "matching cost" in report
    assert "heads.classes.5 (Linear)" in report


def test_an_image_without_objects_and_an_infinite_weight(tmp_path):
    """No object, so the matcher reads no cost at all."""
    step = Step(tmp_path)
    with torch.no_grad():
        step.model.heads.classes[-2].bias[0] = float("inf")
    batch = a_batch()
    batch.targets = [{"labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in batch.targets]
    with pytest.raises(FloatingPointError, match=r"the loss is inf; .*classes\.5\.bias \(1 of 4\)"):
        step.take(batch)


def test_a_target_that_is_not_finite_is_named_as_an_input(tmp_path):
    batch = a_batch()
    batch.targets[1]["boxes"][0, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite: inputs boxes of image 1 \(1 of 8\)"):
        Step(tmp_path).take(batch)


def saved_names(folder: Path, first: int, skipped: int, ranks: int = 1) -> list[str]:
    """Saves a row of bad steps from `first` on; what is left of all that were saved."""
    step = Step(folder)
    poison(step.model, 3)
    for number in range(skipped + 1):
        for rank in range(ranks):
            step.place = Place(folder, step.config, first + number, 0, rank, number)
            with pytest.raises(FloatingPointError):
                step.take(a_batch())
    return sorted(path.stem for path in (folder / "non_finite").iterdir())


def test_the_steps_at_which_a_run_stops_are_saved_and_the_oldest_go(tmp_path):
    for number in range(100, 0, -10):  # step 100 is the oldest, of an earlier attempt
        names = saved_names(tmp_path, number, 0)
    assert len(names) == 10
    names = saved_names(tmp_path, 201, 2)
    kept = (*range(10, 80, 10), 201, 202, 203)
    assert names == [f"step-{n:08d}-rank-0" for n in kept]
    # A row longer than there is room for is kept whole.
    assert saved_names(tmp_path, 301, 11) == [f"step-{n:08d}-rank-0" for n in range(301, 313)]


def test_of_many_ranks_that_find_a_bad_step_one_at_least_saves_it(tmp_path):
    names = saved_names(tmp_path, 5, 2, ranks=12)
    first = sorted(f"step-00000005-rank-{n}" for n in range(10))
    assert names == [*first, "step-00000006-rank-0", "step-00000007-rank-0"]


def on_a_full_disk(file: Path) -> str:
    file.parent.mkdir()
    file.symlink_to("/dev/full")
    return "No space left on device"


def in_a_folder_that_is_a_file(file: Path) -> str:
    file.parent.write_text("")
    return "File exists"


@pytest.mark.parametrize("prepare", [on_a_full_disk, in_a_folder_that_is_a_file])
def test_a_step_that_cannot_be_saved_is_told_all_the_same(tmp_path, prepare):
    """The other ranks wait for what this one says."""
    step, file = Step(tmp_path), saved_file(tmp_path)
    why = prepare(file)
    poison(step.model, 3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan; not finite: ") as caught:
        step.take(a_batch())
    assert str(caught.value).endswith(f"; not saved, as {file} cannot be written: {why}")
    assert not file.exists()


def test_weights_that_are_not_finite_reach_no_checkpoint():
    model = torch.nn.Linear(2, 3)
    require_finite_weights(model, 7)
    with torch.no_grad():
        model.weight[1, 1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"after step 7.*parameters weight \(1 of 6\)"):
        require_finite_weights(model, 7)


def test_files_that_are_no_saved_step(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name, words in {"none": "is no file", "other": "no saved step", "noise": "be read"}.items():
        with pytest.raises(UserError, match=words) as caught:
            replay_saved(tmp_path / f"{name}.pt", CPU)
        assert "\n" not in str(caught.value)


POISONED = """
import sys
import torch
import pipeline.run
import pipeline.step
from pipeline.__main__ import COMMANDS
from pipeline.cli import main

build, seed, engines = pipeline.run.build_engine, pipeline.step.seed_step, []

def build_engine(*given):
    engines.append(build(*given))
    return engines[0]

def seed_step(value, step, rank):
    seed(value, step, rank)
    if rank == 1:
        bias = engines[0].module.heads.classes[-2].bias
        with torch.no_grad():
            if step in (3, 6):
                pipeline.step.before = bias.clone()
                bias[:] = float("nan")
            if step == 5:
                bias[:] = pipeline.step.before

pipeline.run.build_engine, pipeline.step.seed_step = build_engine, seed_step
sys.exit(main("poisoned", "", COMMANDS, sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_bad_step_is_left_out_on_all_ranks_and_a_row_ends_the_run(drawn, tmp_path, capsys):
    """Of two processes the second has NaN in its weights in the steps 4 and 5, and from 7 on. Its
    matcher sees it before any gradient is exchanged."""
    (tmp_path / "poisoned.py").write_text(POISONED)
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            str(tmp_path / "poisoned.py"), "train", "demo",
            "--output", str(folder), "--data.train", str(drawn.shards / "train"),
            "--data.val", str(drawn.shards / "val"), "--schedule.epochs", "1",
            "--optimizer.batch-size", "4", "--engine.checkpoint-steps", "6",
            "--engine.log-every", "6", "--engine.loader-workers", "0",
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode != 0
    said = [x for x in done.stderr.splitlines() if x.startswith("error: step 9, rank 1: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert "parameters heads.classes.5.bias" in said[0]

    lines = read_lines(folder / "metrics.jsonl")
    (train,) = [x for x in lines if x["kind"] == "train"]
    assert (train["step"], train["skipped_steps"]) == (6, 2)
    assert all(math.isfinite(x) for x in train.values() if isinstance(x, float))
    told = [x["text"] for x in lines if "left out" in x.get("text", "")]
    assert [text.split(")")[0][-1] for text in told] == ["1", "2", "1", "2"]  # in a row
    assert "step 4, rank 1" in told[0]
    (ended,) = [x for x in lines if x.get("event") == "diverged"]
    assert ended["step"] == 9
    assert said[0] == f"error: {ended['text']}"

    # The checkpoint before is intact.
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert steps == ["step-00000006"]
    assert check(folder / "checkpoints" / steps[0]) is None
    weights = load_model(folder)["model"]
    assert all(x.isfinite().all() for x in weights.values())
    assert load_training(checkpoint_path(folder, 6))["updates"] == 4

    names = sorted(path.name for path in (folder / "non_finite").iterdir())
    assert names == [f"step-0000000{n}-rank-1.pt" for n in (4, 5, 7, 8, 9)]
    capsys.readouterr()
    given = ["replay", str(folder / "non_finite" / names[0])]
    assert main("python -m pipeline", "", COMMANDS, given) == 0
    report = capsys.readouterr().out
    assert "step 4, rank 1, images" in report
    assert "heads.classes.5 (Linear)" in report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "val"), [("schedule.epochs", True), ("engine.check-after", False)]
)
def test_a_run_that_diverges_before_an_evaluation_stops_with_one_line(
    drawn, tmp_path, run_command, option, val
):
    """Steps 2 and 3 of an epoch of 3 are left out, one fewer than would stop it. Then come the
    label check, where it is due, and the evaluation; images of validation count from 900001."""
    folder = tmp_path / "run"
    given = [
        "pipeline", "train", "demo", "--output", folder, "--data.train", drawn.shards / "train",
        "--data.val", drawn.shards / "val", "--optimizer.batch-size", 16, "--optimizer.lr", 1e30,
        "--engine.precision", "fp32", "--engine.loader-workers", 0, "--engine.device", "cpu",
        f"--{option}", 3,
    ]  # fmt: skip
    done = run_command(*given)
    assert done.returncode == 1, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: after step 3 the predictions are not finite: pred_logits (")
    assert (int(said.split("in images [")[1].split(",")[0]) > 900000) == val
    assert "with a lower --optimizer.lr (got 1e+30)" in said
    assert str(folder / "non_finite" / "step-00000003-rank-0.pt") in said


def test_weights_that_find_nothing_are_refused(drawn, tmp_path, capsys):
    shards = ShardSet(drawn.shards / "val")
    save_checkpoint(tmp_path / "model.pt", build_labels(shards.categories, "contiguous"))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["model"]["heads.classes.1.bias"][:] = torch.nan
    torch.save(content, tmp_path / "model.pt")
    image = next((drawn.coco / "val").glob("*.jpg"))
    for command, *options in [
        ("evaluate", "--data", drawn.shards / "val"),
        ("evaluate", "--data", drawn.shards / "val", "--tta"),
        ("predict", image, "--output", tmp_path / "found"),
        ("visualize", "--data", drawn.shards / "val", "--output", tmp_path / "figures"),
    ]:
        given = [command, tmp_path / "model.pt", *options]
        assert main("python -m pipeline", "", COMMANDS, [str(x) for x in given]) == 2
        (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert f"checkpoint {tmp_path / 'model.pt'}: predictions are not finite: pred_lo" in said
        assert "no object can be found with these weights, give others, such as an earlier" in said
