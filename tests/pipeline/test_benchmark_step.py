"""`benchmark-step`: real steps of real contenders, and what it must not let pass."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.criterion import build_criterion
from model.detr import build_model
from pipeline import benchmark_step as module
from pipeline.__main__ import COMMANDS
from pipeline.benchmark_step import make_batches, measure
from pipeline.cli import main
from pipeline.contenders import Contender, build_contender
from pipeline.engine import build_optimizer
from pipeline.recipes import recipe
from pipeline.step_report import row, table
from pipeline.step_timing import PHASES, Marks, Workload, train_step

CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    return main("pipeline", "", COMMANDS, ["benchmark-step", *map(str, arguments)])


def figures_hold(facts: dict[str, Any], batch_size: int, steps: int) -> None:
    """What must be true of a contender's figures on a CPU."""
    assert facts["steps"] == steps
    step = facts["step"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert facts["images_per_second"] == pytest.approx(1000 * batch_size / step["median"])
    low, high = (sum(facts["host"][phase][end] for phase in PHASES) for end in ("low", "high"))
    # The phases follow each other without a gap, so they add up to a step.
    assert low <= 1.02 * step["high"]
    assert high >= 0.98 * step["low"]
    assert all(facts["host"][phase]["low"] > 0 for phase in PHASES)
    assert facts["on_device"] is facts["syncs"] is facts["device_busy"] is None
    assert math.isfinite(facts["first_loss"])
    assert facts["last_loss"] != facts["first_loss"]
    assert facts["peak_memory"] >= 0


def test_the_demo_with_other_operators_and_its_loader(
    drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "step.json"
    status = run(
        "demo", "--size", 64, 96, "--batch-sizes", 1, 2, "--precisions", "fp32", "bf16",
        "--beside", "reference", "grid_sample", "--steps", 2, "--device", "cpu",
        "--data", drawn.shards / "train", "--workers", 0, "--output", output,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads(output.read_text())
    assert report["recipe"] == "demo"
    assert report["size"] == [64, 96]
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert len(report["commit"].removesuffix("-dirty")) == 40 or report["commit"] == "unknown"
    work = [(w["batch_size"], w["precision"]) for w in report["workloads"]]
    assert work == [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
    for workload in report["workloads"]:
        ours, *others = workload["contenders"]
        assert [c["contender"] for c in others] == ["reference", "grid_sample"]
        # Under autocast the formulation rounds locations to 16 bits.
        close = 1e-4 if workload["precision"] == "fp32" else 0.05
        for facts in (ours, *others):
            figures_hold(facts, workload["batch_size"], 2)
            assert facts["first_loss"] == pytest.approx(ours["first_loss"], rel=close)
            assert facts["trained_parameters"] == ours["trained_parameters"]
        assert ours["step_over_ours"] == {"median": 1, "low": 1, "high": 1}
        times = ours["matcher"]
        assert 0 < times["assign"] < times["total"]
        assert times["total"] == pytest.approx(times["costs"] + times["wait"] + times["assign"])
        assert workload["loader"]["images_per_second"] > 0
        assert f"batch {workload['batch_size']}, {workload['precision']}" in printed.out
    assert "loader:" in printed.out


def test_the_papers_model_beside_transformers(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    status = run(
        "deformable_detr_r50", "--size", 64, 64, "--batch-sizes", 1, "--precisions", "fp32",
        "--beside", "reference", "grid_sample", "transformers", "--steps", 1, "--device", "cpu",
        "--model.num-queries", 30, "--output", output,
    )  # fmt: skip
    assert status == 0
    (workload,) = json.loads(output.read_text())["workloads"]
    ours, by_definition, by_grid_sample, theirs = workload["contenders"]
    for facts in workload["contenders"]:
        figures_hold(facts, 1, 1)
        assert facts["trained_parameters"] == ours["trained_parameters"]
    assert by_definition["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert by_grid_sample["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert "transformers" in theirs["what"]
    assert ours["peak_memory"] > 0


def test_batches_have_boxes_like_cocos() -> None:
    batches = make_batches((40, 50), 8, num_classes=4, seed=3)
    targets = [target for batch in batches for target in batch.targets]
    counts = [len(target["labels"]) for target in targets]
    assert sum(counts) / len(counts) == pytest.approx(7, abs=0.5)
    assert min(counts) == 0
    assert 30 < max(counts) <= 60
    boxes = torch.cat([target["boxes"] for target in targets])
    assert (boxes[:, :2] - boxes[:, 2:] / 2 >= -1e-6).all()
    assert (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-6).all()
    assert boxes[:, 2:].min() > 0
    labels = torch.cat([target["labels"] for target in targets])
    assert set(labels.tolist()) == {1, 2, 3}
    again, other = (make_batches((40, 50), 8, 4, seed)[0] for seed in (3, 4))
    assert torch.equal(again.images, batches[0].images)
    assert not torch.equal(other.images, batches[0].images)


def demo_workload() -> tuple[Workload, Any]:
    config = recipe("demo")
    config = replace(config, engine=replace(config.engine, precision="fp32"))
    batches = make_batches((64, 64), 1, config.model.num_classes, 0)
    return Workload((64, 64), 1, "fp32", CPU, batches), config


def test_the_step_is_the_trainers() -> None:
    """One step of `ours` moves the weights as the same lines written out do."""
    work, config = demo_workload()
    contender = build_contender("ours", config, CPU)
    torch.manual_seed(config.seed)
    model = build_model(config.model).train()
    optimizer = build_optimizer(model, config)
    batch = work.batches[0]
    loss = build_criterion(config.model)(
        model(batch.normalized_images(), batch.padding_mask), batch.targets
    )["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

    assert train_step(contender, work, batch, Marks(CPU)) == loss
    expected = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p for group in contender.groups for p in group]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"update": lambda: None}, RuntimeError, "parameter group 0 unchanged"),
        (
            {"score": lambda outputs, targets: outputs["pred_boxes"].sum() * math.nan},
            FloatingPointError,
            "the first loss is nan",
        ),
    ],
)
def test_a_contender_that_does_not_learn_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict, error: type[Exception], words: str
) -> None:
    def broken(*arguments: Any) -> Contender:
        return replace(build_contender(*arguments), **changes)

    monkeypatch.setattr(module, "build_contender", broken)
    work, config = demo_workload()
    with pytest.raises(error, match=words):
        measure(work, config, ["ours"], 1)


def test_memory_that_does_not_suffice_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(name: str, *arguments: Any) -> Contender:
        contender = build_contender(name, *arguments)

        def predict(*inputs: Any) -> Any:
            raise torch.OutOfMemoryError("tried to allocate 1 TiB\nand more")

        return replace(contender, predict=predict) if name == "reference" else contender

    monkeypatch.setattr(module, "build_contender", greedy)
    work, config = demo_workload()
    ours, greedy_one = measure(work, config, ["ours", "reference"], 2)
    assert greedy_one.failed == "out of memory: tried to allocate 1 TiB"
    assert not ours.failed
    assert len(ours.rounds) == 2
    rows = [row(result, ours, 1) for result in (ours, greedy_one)]
    assert "step" in rows[0]
    assert set(rows[1]) == {"contender", "what", "failed"}
    assert "reference    out of memory: tried to allocate 1 TiB" in table(work, rows, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--beside", "grid"], ["unknown contender 'grid'", "grid_sample"]),
        (["demo", "--beside", "transformers"], ["backbone tiny", "resnet50"]),
        (["demo", "--beside", "ours"], ["each once"]),
        (["deformable_detr_r50", "--beside", "official=/a", "official=/b"], ["each once"]),
        (["deformable_detr_r50", "--beside", "official=/none"], ["official=/none", "checkout"]),
        (["deformable_detr_r50", "--beside", "official"], ["official=PATH"]),
        (["demo", "--precisions", "fp8"], ["fp8"]),
        (["demo", "--batch-sizes", "0"], ["--batch-sizes: got 0"]),
        (["demo", "--steps", "0"], ["--steps 0"]),
        (["demo", "--data", "/none"], ["'/none' does not exist"]),
        (["demmo"], ["unknown recipe"]),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(*arguments, *([] if arguments == ["demmo"] else ["--device", "cpu"]))
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    for word in words:
        assert word in line


def test_an_extension_that_is_not_built_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("import MultiScaleDeformableAttention\n")
    (tmp_path / "models" / "deformable_detr.py").touch()
    status = run("deformable_detr_r50", "--beside", f"official={tmp_path}", "--device", "cpu")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert "No module named 'MultiScaleDeformableAttention'" in line
    assert "build its extension" in line


def test_too_few_images_for_the_loader(drawn, capsys: pytest.CaptureFixture[str]) -> None:
    status = run(
        "demo", "--size", 64, 64, "--precisions", "fp32", "--steps", 1, "--device", "cpu",
        "--data", drawn.shards / "val", "--workers", 2,
    )  # fmt: skip
    assert status == 2
    assert "got 12 images, expected 20 or more" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--device", "cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


WITHOUT_THE_TRAINERS_PACKAGES = """
import sys
sys.modules.update(dict.fromkeys({names}))  # None: not to be found
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
options = "demo --size 32 32 --batch-sizes 1 --precisions fp32 --steps 1 --device cpu".split()
sys.exit(main("pipeline", "", COMMANDS, ["benchmark-step", *options]))
"""


def test_a_bare_machine_will_do() -> None:
    names = [
        "deepspeed", "ray", "mlflow", "webdataset", "pycocotools", "tqdm", "filelock", "psutil",
        "matplotlib", "transformers", "setuptools",
    ]  # fmt: skip
    code = WITHOUT_THE_TRAINERS_PACKAGES.format(names=names)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32x32, batch 1, fp32" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    status = run(
        "deformable_detr_r50", "--size", 256, 256, "--beside", "grid_sample", "--steps", 4,
        "--device", "cuda", "--output", output,
    )  # fmt: skip
    assert status == 0
    for workload in json.loads(output.read_text())["workloads"]:
        ours = workload["contenders"][0]
        assert ours["syncs"]["loss"] == 1  # the matcher's, for all layers at once
        assert ours["syncs"]["backward"] == ours["syncs"]["optimizer"] == 0
        assert 0 < ours["device_busy"] <= 1.1 * ours["first_step"]
        on_device = sum(ours["on_device"][phase]["median"] for phase in PHASES)
        assert on_device == pytest.approx(ours["step"]["median"], rel=0.3)
        assert ours["peak_memory"] > 4 * ours["trained_parameters"] * 3 / 2**20


def test_a_model_that_asks_for_targets_is_given_them() -> None:
    config = recipe("dn_dab_detr_r50_demo")
    contender = build_contender("ours", config, CPU)
    batch = make_batches((64, 64), 2, config.model.num_classes, 0)[0]
    outputs = contender.predict(batch.normalized_images(), batch.padding_mask, batch.targets)
    assert [x["group"].name for x in outputs["groups"]] == ["dn"]
    assert contender.score(outputs, batch.targets).isfinite()
