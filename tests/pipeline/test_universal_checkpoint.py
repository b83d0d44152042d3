"""A checkpoint in DeepSpeed's universal format: plain engines of every stage go on from it."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.detr import build_model
from pipeline.__main__ import COMMANDS
from pipeline.checkpoint_store import Progress, checkpoint_path, write
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.recipes import recipe
from pipeline.training_state import MOMENTS
from pipeline.universal_checkpoint import write_universal
from tests.markdown_text import blocks

ROOT = Path(__file__).resolve().parents[2]
EXACT = {"weights": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
CLIENT = ["config", "ds_version", "ema", "ema_updates", "labels", "universal_checkpoint_info"]


def engines(mode: str, folder: Path, ranks: int) -> dict:
    launcher = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    script = Path(__file__).with_name("universal_engines.py")
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), str(script), mode, str(folder)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
def test_plain_engines_of_every_stage_go_on_from_it(tmp_path):
    """A run of ours of 3 updates in 5 steps, then two steps more, on 2 processes and on 1."""
    for mode, ranks in (("train", 2), ("load", 1)):
        report = engines(mode, tmp_path, ranks)
        assert report.keys() == {"1", "2", "3"}
        for stage, found in report.items():
            where = (stage, ranks)
            assert found["at_once"] == EXACT, where
            assert found["counts"] == [3, 3, 3], where
            assert found["steps"] == {"global": 5, "skipped": 2, "schedule": 5}, where
            assert found["client"] == CLIENT, where
            assert found["same_average"], where
            assert max(found["then"].values()) < 1e-6, (where, found["then"])
            assert found["counts_then"] == [5, 5, 5], where
            # What docs/training.md has programs do, because DeepSpeed 0.19.8 does not.
            assert not found["reads_frozen"], where
            assert found["alone"] == ([4, 4, 4] if stage != "3" else [6, 6, 6]), where
            assert found["rates_alone"] == found["rates_of_the_start"], where


IN_ONE_PROCESS = """
import torch
from pipeline.engine import start_process_group
start_process_group(torch.device("cpu"))
"""
WHAT_CAME_OF_IT = """
from pipeline.training_state import gather
from pipeline.zero3 import weights_on_host
torch.save({
    "moments": gather(engine)["moments"], "weights": weights_on_host(engine.module, True),
    "counts": [float(state["step"]) for state in engine.optimizer.optimizer.state.values()],
    "rates": [group["lr"] for group in engine.optimizer.param_groups],
}, "found.pt")
"""


@pytest.mark.slow
def test_the_program_of_the_guide_goes_on(tmp_path):
    """As it is printed, with a detector of ours in stage 3."""
    config = recipe("demo")
    torch.manual_seed(0)
    model = build_model(config.model)
    weights = model.state_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments = {n: {key: torch.rand(weights[n].shape) for key in MOMENTS} for n in trained}
    state = {"moments": moments, "updates": 1200}
    make_run(tmp_path / "run", weights, state, step=1200, config=config.to_json())
    write_universal(tmp_path / "run", tmp_path / "r50-universal")
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    guide = [block.content for block in blocks(ROOT / "docs" / "training.md")]
    (program,) = [text for text in guide if "engine.load_checkpoint" in text]
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS + program + WHAT_CAME_OF_IT],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(found["weights"][name], value) for name, value in weights.items())
    for name in trained:
        assert all(torch.equal(found["moments"][name][key], moments[name][key]) for key in MOMENTS)
    assert found["counts"] == [1200] * 3
    assert found["rates"] == pytest.approx([2e-5] * 3)  # after the drop of the guide's schedule


# --- what is written ----------------------------------------------------------------------------

STEP, TAG = 250, "global_step250"


def parameters() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=random).to(memory_format=torch.channels_last)
    return {
        "body.weight": weight,
        "head.bias": torch.randn(5, generator=random),
        "stem.frozen": torch.randn(2, generator=random),
    }


def training(weights: dict[str, Tensor]) -> dict:
    trained = {n: x for n, x in weights.items() if n != "stem.frozen"}
    moments = {n: {"exp_avg": x / 2, "exp_avg_sq": x**2} for n, x in trained.items()}
    return {"moments": moments, "updates": 240}


def make_run(
    run: Path, weights: dict[str, Tensor], state: dict, step: int = STEP, config: str = "{}"
) -> Path:
    """Leaves a checkpoint and returns where it is."""
    labels = {"category_of": [1], "names": ["shape"]}
    progress = Progress(step, 2)
    model = {"model": weights, "config": config, "labels": labels, "progress": asdict(progress)}
    return write(run, progress, model, state)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", parameters(), training(parameters()))
    return tmp_path / "run"


def read(file: Path):
    return torch.load(file, weights_only=True)


def test_the_files_have_every_parameter_whole_and_no_code(run, tmp_path):
    output = tmp_path / "out"
    assert write_universal(run, output).step == STEP
    assert (output / "latest_universal").read_text() == TAG
    zero, state = output / TAG / "zero", training(parameters())
    names = sorted(state["moments"])
    assert sorted(p.name for p in zero.iterdir()) == [*names, "optimizer_state.pt"]
    for name in names:
        for key, value in {"fp32": parameters()[name], **state["moments"][name]}.items():
            found = read(zero / name / f"{key}.pt")["param"]
            assert torch.equal(found, value)
            assert found.is_contiguous()  # DeepSpeed's stage 3 lays it flat by view()
            assert found.dtype == torch.float32
        assert read(zero / name / "step.pt") == 240
    groups = read(zero / "optimizer_state.pt")["param_groups"]
    assert groups == [{"params": []}] * 2
    shared = read(output / TAG / "mp_rank_00_model_states.pt")
    module = shared.pop("module")
    assert module.keys() == parameters().keys()
    assert all(torch.equal(module[name], value) for name, value in parameters().items())
    assert (shared["global_steps"], shared["skipped_steps"]) == (STEP, 10)
    assert read(output / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt") == shared
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_with_an_average_the_weights_are_those_that_are_trained(tmp_path):
    average = {name: value + 1 for name, value in parameters().items()}
    state = {**training(parameters()), "weights": parameters(), "ema_updates": 240}
    step = make_run(tmp_path / "run", average, state)
    write_universal(step, tmp_path / "out")  # a checkpoint itself, rather than the run
    folder = tmp_path / "out" / TAG
    shared = read(folder / "mp_rank_00_model_states.pt")
    bias = parameters()["head.bias"]
    assert torch.equal(read(folder / "zero" / "head.bias" / "fp32.pt")["param"], bias)
    assert torch.equal(shared["module"]["head.bias"], bias)
    assert torch.equal(shared["ema"]["head.bias"], bias + 1)
    assert shared["ema_updates"] == 240


def test_of_a_run_the_best_checkpoint_is_taken(run, tmp_path):
    make_run(run, parameters(), training(parameters()), step=STEP + 1)
    (run / "best.json").write_text(json.dumps({"checkpoint": f"step-{STEP:08d}"}))
    assert write_universal(run, tmp_path / "best").step == STEP
    (run / "best.json").unlink()
    assert write_universal(run, tmp_path / "newest").step == STEP + 1


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["a file", "a folder"])
def test_what_is_there_already_is_left_alone(run, tmp_path, there, capsys):
    output = tmp_path / "out"
    kept = output if there == "a file" else output / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert main("", "", COMMANDS, ["universal", str(run), "--output", str(output)]) == 2
    said = f"error: --output: {str(output)!r} exists already, expected a new folder\n"
    assert capsys.readouterr().err == said
    assert kept.read_text() == "mine"


def test_an_output_in_no_folder(run, tmp_path):
    with pytest.raises(UserError, match=r"folder '.*nowhere' does not exist"):
        write_universal(run, tmp_path / "nowhere" / "out")


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        write_universal(tmp_path / "run", tmp_path / "out")


def test_a_checkpoint_that_is_not_whole(run, tmp_path):
    step = checkpoint_path(run, STEP)
    (tmp_path / "model.pt").write_bytes((step / "model.pt").read_bytes())
    with pytest.raises(UserError, match="not a whole checkpoint: it has no manifest"):
        write_universal(tmp_path / "model.pt", tmp_path / "out")
    damaged = bytearray((step / "training.pt").read_bytes())
    damaged[-200] ^= 1
    (step / "training.pt").write_bytes(damaged)
    with pytest.raises(UserError, match=r"training.pt is not what was written"):
        write_universal(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        ("../../escaped", {}, r"moments of '\.\./\.\./escaped', which is none of the weights"),
        ("head", {}, "moments of 'head', which is none"),
        ("head.bias", {"exp_avg": torch.zeros(5)}, "moments of head.bias are missing"),
        (
            "head.bias",
            {"exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(1)},
            "or have another shape than its weights",
        ),
    ],
)
def test_an_optimizers_state_of_other_weights(tmp_path, name, pair, message):
    """Names become folders: none may lead out of the output."""
    weights = {**parameters(), "../../escaped/x": torch.zeros(5)}
    state = training(parameters())
    state["moments"][name] = pair
    make_run(tmp_path / "run", weights, state)
    with pytest.raises(UserError, match=message):
        write_universal(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_name_that_leads_out_of_the_folder(tmp_path):
    weights = {"../../../escaped": torch.zeros(2)}
    make_run(tmp_path / "run", weights, training(weights))
    with pytest.raises(UserError, match="none of the weights"):
        write_universal(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_checkpoint_without_an_optimizers_state(tmp_path):
    make_run(tmp_path / "run", parameters(), {})
    with pytest.raises(UserError, match="it has no state of an optimizer"):
        write_universal(tmp_path / "run", tmp_path / "out")


def test_a_disk_that_fails_leaves_nothing(tmp_path, capsys):
    weights = {**parameters(), "large": torch.zeros(100_000)}
    make_run(tmp_path / "run", weights, training(weights))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        argv = ["universal", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
        status = main("", "", COMMANDS, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "File too large; raise the limit" in error
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
