"""Fine-tuning: which tensors come from the checkpoint, which are fresh, and what is refused."""

import importlib.util
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from model.config import ModelConfig
from model.detr import build_model
from model.weights import load_official
from pipeline.checkpoint_store import Progress, load_model, write
from pipeline.config import InitConfig
from pipeline.engine import seed_step
from pipeline.errors import UserError
from pipeline.initialise import initial_model, shortened
from pipeline.recipes import recipe
from pipeline.tracking import read_lines

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"category_of": (1, 2), "names": ("cat", "dog")}


def published_checkpoints():
    """tests/model/test_weights.py, which makes checkpoints in the published names and shapes."""
    file = ROOT / "tests" / "model" / "test_weights.py"
    spec = importlib.util.spec_from_file_location("published_checkpoints", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEIGHTS = published_checkpoints()


def run_config(model: ModelConfig, weights: Path | str = "", backbone: Path | str = ""):
    return replace(
        recipe("demo"), model=model, init=InitConfig(weights=str(weights), backbone=str(backbone))
    )


def is_class_head(name: str) -> bool:
    return name.startswith("heads.classes.")


@pytest.fixture(params=["base", "refine", "two_stage"])
def published(request, tmp_path):
    """A model's config with 7 classes, and a file of that architecture as published."""
    config = ModelConfig(**(WEIGHTS.SMALL | WEIGHTS.VARIANTS[request.param]))
    torch.manual_seed(1)
    state = WEIGHTS.published(config.refines, config.two_stage, config.num_levels)
    torch.save({"model": state, "epoch": 49}, tmp_path / "published.pth")
    return config, state, tmp_path / "published.pth"


def test_a_published_checkpoint_of_as_many_classes_is_loaded_whole(published):
    config, state, file = published
    model, said = initial_model(run_config(config, file))
    expected = build_model(config)
    load_official(expected, state)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert said == f"init.weights {file}: all {len(state)} tensors are loaded"


def test_for_other_classes_only_the_class_heads_are_fresh(published):
    config, state, file = published
    other = replace(config, num_classes=4)
    model, said = initial_model(run_config(other, file))
    expected = build_model(config)
    load_official(expected, state)
    seed_step(recipe("demo").seed, 0, 0)
    fresh = build_model(other).state_dict()
    heads = 0
    for name, value in model.state_dict().items():
        wanted = fresh[name] if is_class_head(name) else expected.state_dict()[name]
        assert torch.equal(value, wanted), name
        if is_class_head(name):
            heads += 1
            assert name in said
            assert value.shape[0] == 4
            if name.endswith("bias"):
                torch.testing.assert_close(value, torch.full((4,), -math.log(99.0)))
    copies = {"base": 1, "refine": 3, "two_stage": 4}
    assert heads == 2 * copies["two_stage" if config.two_stage else
                               "refine" if config.box_refine else "base"]  # fmt: skip
    assert "7 rows and this run's 4" in said


def our_checkpoint(tmp_path, classes: int, **changes):
    """A model.pt of the demo's model with random weights in every tensor, class heads too."""
    config = replace(recipe("demo"), model=replace(recipe("demo").model, num_classes=classes))
    config = replace(config, model=replace(config.model, **changes))
    torch.manual_seed(5)
    state = {n: torch.randn_like(x) for n, x in build_model(config.model).state_dict().items()}
    labels = {"category_of": tuple(range(classes)), "names": tuple("abcdefghij"[:classes])}
    content = {"model": state, "config": config.to_json(), "labels": labels, "progress": {}}
    write(tmp_path / "run", Progress(5, 1), content, {})
    (tmp_path / "run" / "best.json").write_text('{"checkpoint": "step-00000005"}')
    return state


@pytest.mark.parametrize(
    "where",
    ["run", "run/checkpoints/step-00000005", "run/checkpoints/step-00000005/model.pt"],
)
@pytest.mark.parametrize("classes", [4, 6])
def test_a_checkpoint_of_ours_wherever_it_is_pointed_at(tmp_path, where, classes):
    state = our_checkpoint(tmp_path, 4)
    config = replace(recipe("demo").model, num_classes=classes)
    model, said = initial_model(run_config(config, tmp_path / where))
    for name, value in model.state_dict().items():
        if classes == 4 or not is_class_head(name):
            assert torch.equal(value, state[name]), name
        elif name.endswith("bias"):
            torch.testing.assert_close(value, torch.full((6,), -math.log(99.0)))
    # Six decoder layers and the first stage, each a weight and a bias.
    assert said.count("heads.classes.") == (0 if classes == 4 else 14)
    assert ("re-initialised" in said) == (classes == 6)


@pytest.mark.parametrize(
    ("names", "loaded"),
    [("abcd", True), ("bacd", False), ("wxyz", False), ("", True)],
)
def test_a_class_head_is_of_classes_by_name(tmp_path, names, loaded):
    state = our_checkpoint(tmp_path, 4)
    config = run_config(replace(recipe("demo").model, num_classes=4), tmp_path / "run")
    model, said = initial_model(config, tuple(names))
    seed_step(config.seed, 0, 0)
    fresh = build_model(config.model).state_dict()
    for name, value in model.state_dict().items():
        from_the_file = loaded or not is_class_head(name)
        assert torch.equal(value, state[name] if from_the_file else fresh[name]), name
    if loaded:
        assert said.endswith(f"all {len(state)} tensors are loaded")
    else:
        assert "re-initialised heads.classes.0.weight" in said
        ours = ", ".join(names)
        assert f"because the checkpoint's classes are a, b, c, d and this run's {ours};" in said


def test_names_of_a_published_file_are_not_known(published):
    config, state, file = published
    _, said = initial_model(run_config(config, file), tuple("tuvwxyz"))
    assert said == f"init.weights {file}: all {len(state)} tensors are loaded"


def test_detr_keeps_its_column_for_no_object(tmp_path):
    config = replace(
        recipe("detr_r50").model, num_classes=3, hidden_dim=32, num_heads=2, feedforward_dim=48,
        encoder_layers=1, decoder_layers=1, num_queries=5, backbone="tiny",
    )  # fmt: skip
    state = build_model(config).state_dict()
    run = replace(recipe("demo"), model=config)
    torch.save({"model": state, "config": run.to_json(), "labels": LABELS}, tmp_path / "model.pt")
    model, said = initial_model(run_config(replace(config, num_classes=9), tmp_path / "model.pt"))
    assert model.heads.classes.weight.shape == (10, 32)
    assert "heads.classes.weight, heads.classes.bias" in said
    assert "4 rows and this run's 10" in said
    assert torch.equal(model.queries.embed, state["queries.embed"])


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        initial_model(config)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, message
    return message


@pytest.mark.parametrize("ours", [True, False])
def test_faster_rcnn_replaces_classes_and_their_boxes(tmp_path, ours):
    config = replace(recipe("faster_rcnn_r50_fpn").model, num_classes=91)
    if ours:
        state = build_model(config).state_dict()
        run = replace(recipe("demo"), model=config)
        content = {"model": state, "config": run.to_json(), "labels": LABELS}
    else:
        net = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None
        )
        content = state = net.state_dict()
    torch.save(content, tmp_path / "model.pt")
    whole, said = initial_model(run_config(config, tmp_path / "model.pt"))
    assert "all " in said
    own = whole.state_dict()
    for name in ("cls_score.weight", "bbox_pred.bias"):
        key = f"roi_heads.box_predictor.{name}"
        assert torch.equal(own[key], state[key])
    other, said = initial_model(run_config(replace(config, num_classes=5), tmp_path / "model.pt"))
    assert "91 rows and this run's 5" in said
    for name, value in other.state_dict().items():
        if name.startswith("roi_heads.box_predictor."):
            assert len(value) == (5 if "cls_score" in name else 20)
        else:
            assert torch.equal(value, own[name]), name


def test_another_architecture_of_ours_is_named(tmp_path):
    our_checkpoint(tmp_path, 4, hidden_dim=32, num_queries=11, two_stage=False)
    message = refusal(run_config(recipe("demo").model, tmp_path / "run"))
    assert "model.hidden_dim: got 32, expected 64" in message
    assert "model.two_stage: got False, expected True" in message
    assert "num_classes" not in message


def test_another_published_architecture_is_one_short_line(published):
    config, _, file = published
    other = replace(config, two_stage=not config.two_stage, box_refine=True, num_classes=4)
    assert "missing keys: " in refusal(run_config(other, file))
    wide = replace(config, hidden_dim=64, feedforward_dim=96)
    assert "got (" in refusal(run_config(wide, file))


def test_files_that_are_no_detector(tmp_path):
    config = recipe("demo").model
    net = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(net, tmp_path / "resnet18.pth")
    (tmp_path / "noise.pth").write_bytes(b"no weights")
    (tmp_path / "empty").mkdir()
    message = refusal(run_config(config, tmp_path / "resnet18.pth"))
    assert "no class head" in message
    assert "--init.backbone" in message
    assert "noise.pth" in refusal(run_config(config, tmp_path / "noise.pth"))
    assert "not a checkpoint" in refusal(run_config(config, tmp_path / "empty"))
    assert "no such file" in refusal(run_config(config, tmp_path / "none.pth"))
    r50 = replace(WEIGHTS.case("base")[0].config)
    assert "no such file" in refusal(run_config(r50, backbone=tmp_path / "none.pth"))
    assert "missing keys" in refusal(run_config(r50, backbone=tmp_path / "resnet18.pth"))


def test_heads_that_disagree_about_the_classes_are_refused(published, tmp_path):
    config, state, _ = published
    state["class_embed.1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "mixed.pth")
    assert "[3, 7] classes" in refusal(run_config(config, tmp_path / "mixed.pth"))


def test_random_weights_are_said_where_they_matter():
    model, said = initial_model(run_config(replace(WEIGHTS.case("base")[0].config)))
    assert "starts from random weights" in said
    again, said = initial_model(run_config(recipe("demo").model))
    assert said == ""
    assert model.config != again.config


@pytest.mark.slow
def test_a_resumed_fine_tuning_goes_on_with_its_own_heads(drawn, tmp_path, run_command):
    labels = {"category_of": tuple(range(9)), "names": tuple("abcdefghi")}
    start = replace(recipe("demo"), model=replace(recipe("demo").model, num_classes=9))
    content = {"config": start.to_json(), "labels": labels}
    torch.save({**content, "model": build_model(start.model).state_dict()}, tmp_path / "model.pt")
    folder = tmp_path / "run"
    command = (
        "pipeline", "train", "demo", "--output", folder, "--init.weights", tmp_path / "model.pt",
        "--data.train", drawn.shards / "train", "--data.val", drawn.shards / "val",
        "--optimizer.batch-size", 8, "--schedule.epochs", 1, "--engine.checkpoint-steps", 2,
        "--engine.keep-checkpoints", 5, "--engine.precision", "fp32",
    )  # fmt: skip
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    whole = load_model(folder)["model"]
    for step in (4, 5):
        shutil.rmtree(folder / "checkpoints" / f"step-0000000{step}")
    (folder / "best.json").unlink()
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    resumed = load_model(folder)["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    texts = [x["text"] for x in read_lines(folder / "metrics.jsonl") if x.get("text")]
    assert sum("re-initialised heads.classes.0.weight" in text for text in texts) == 1
    assert "resumed after step 2" in texts[-1]


def test_long_lists_are_cut():
    assert shortened("keys: a, b, c, d, e; other: f") == "keys: a, b, c, and 2 more; other: f"
    assert shortened("a, b, c, d") == "a, b, c, d"
    assert shortened("a: 1; b: 2; c: 3; d: 4; e: 5") == "a: 1; b: 2; c: 3; and 2 more"
