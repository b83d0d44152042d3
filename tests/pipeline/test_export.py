"""`export` to files: they detect what the checkpoint does, also where this repository is not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import export as export_module
from pipeline.errors import UserError
from pipeline.export_torch import read_safetensors
from pipeline.predict import Detector
from tests.pipeline.export_cases import (
    LABELS,
    assert_same,
    checkpoint,
    expected,
    export,
    lively,
    padded,
    pictures,
    tiny,
)

ROOT = Path(__file__).parents[2]
BATCHES = ([(97, 131)], [(64, 90)], [(128, 100), (77, 160)], [(120, 121), (120, 66)])


@pytest.fixture(scope="module")
def made(made_once):
    """A checkpoint's model, and the folder of its files."""
    # One level is traced several times as fast; test_export_graph.py has them all.
    config = tiny(
        "deformable_detr_r50_single_scale_demo", two_stage=True, num_queries=4, decoder_layers=1
    )

    def make(folder: Path) -> None:
        checkpoint(config, folder / "model.pt")
        for kind, suffix in (("onnx", "onnx"), ("torch", "pt2"), ("safetensors", "safetensors")):
            output = folder / f"detector.{suffix}"
            assert export(folder / "model.pt", "--format", kind, "--output", output) == 0

    folder = made_once("exported", make)
    assert {path.name for path in folder.iterdir()} == {
        "model.pt", "detector.onnx", "detector.pt2", "detector.safetensors",
    }  # fmt: skip
    return lively(config), folder


def test_onnx_at_several_sizes_with_padding(made):
    model, folder = made
    session = onnxruntime.InferenceSession(folder / "detector.onnx")
    for seed, shapes in enumerate(BATCHES):
        images = pictures(*shapes, seed=seed)
        batch, sizes = padded(images, colour=77)
        found = session.run(None, {"images": batch.numpy(), "sizes": sizes.numpy()})
        assert_same(tuple(map(torch.from_numpy, found)), expected(model, images))


def test_onnx_says_what_it_is(made):
    _, folder = made
    proto = onnx.load(folder / "detector.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {(opset.domain, opset.version) for opset in proto.opset_import} == {("", 18)}
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    session = onnxruntime.InferenceSession(folder / "detector.onnx")
    described = {v.name: (v.type, v.shape) for v in session.get_inputs() + session.get_outputs()}
    assert described == {
        "images": ("tensor(uint8)", ["batch", 3, "height", "width"]),
        "sizes": ("tensor(int64)", ["batch", 2]),
        "scores": ("tensor(float)", ["batch", 16]),
        "labels": ("tensor(int64)", ["batch", 16]),
        "boxes": ("tensor(float)", ["batch", 16, 4]),
    }
    facts = session.get_modelmeta().custom_metadata_map
    facts = {name: json.loads(text) for name, text in facts.items()}
    assert facts["names"] == list(LABELS.names)
    assert facts["category_ids"] == list(LABELS.category_of)
    assert facts["mean"] == [0.485, 0.456, 0.406]
    assert (facts["short_side"], facts["max_side"], facts["smallest_side"]) == (0, 160, 64)
    assert facts["config"]["model"]["num_queries"] == 4
    assert facts["version"] == "0.1.0"
    assert str(ROOT).encode() not in (folder / "detector.onnx").read_bytes()


def test_the_torch_archive_needs_nothing_of_ours(made, tmp_path):
    model, folder = made
    batches = [pictures(*shapes, seed=seed) for seed, shapes in enumerate(BATCHES)]
    torch.save([padded(images, colour=77) for images in batches], tmp_path / "inputs.pt")
    script = f"""
import json, sys, torch
assert "{ROOT}" not in sys.path
extra = {{"metadata.json": ""}}
module = torch.export.load({str(folder / "detector.pt2")!r}, extra_files=extra).module()
assert json.loads(extra["metadata.json"])["names"] == ["", "cat", "dog", ""]
with torch.no_grad():
    torch.save([module(*inputs) for inputs in torch.load("inputs.pt")], "outputs.pt")
ours = {{"cuda_ops", "model", "pipeline", "torchvision"}} & set(sys.modules)
assert not ours, ours
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, timeout=600)
    outputs = torch.load(tmp_path / "outputs.pt")
    for images, found in zip(batches, outputs, strict=True):
        assert_same(found, expected(model, images))


def test_safetensors_there_and_back(made, tmp_path):
    model, folder = made
    detector = read_safetensors(folder / "detector.safetensors")
    assert detector.labels == LABELS
    assert detector.config.model == Detector.load(folder / "model.pt", "cpu").config.model
    state = detector.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)

    (tmp_path / "torn").write_bytes((folder / "detector.safetensors").read_bytes()[:1000])
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name, words in (("torn", "cannot be read"), ("foreign", "not an export")):
        with pytest.raises(UserError, match=words):
            read_safetensors(tmp_path / name)


def test_the_script_in_the_docs(made, tmp_path, monkeypatch):
    model, folder = made
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    script = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert "onnxruntime" in script
    image = pictures((97, 131))[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "street.jpg", format="PNG")
    (tmp_path / "r50.onnx").write_bytes((folder / "detector.onnx").read_bytes())
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(script, variables)

    wanted = expected(model, [image])[0]
    kept = wanted["scores"] > 0.3
    assert kept.sum() > 3
    found = variables["found"]
    assert isinstance(found, list)
    names = sorted(LABELS.names[column] for column in wanted["labels"][kept].tolist())
    assert sorted(name for name, _, _ in found) == names
    np.testing.assert_allclose([score for _, score, _ in found], wanted["scores"][kept], atol=1e-4)
    corners = wanted["boxes"][kept].numpy() * [131, 97, 131, 97]
    for _, _, box in found:
        assert np.abs(corners - box).max(1).min() < 0.02


def test_mistakes_are_one_line(tmp_path, capsys):
    config = tiny("faster_rcnn_r50_fpn_demo")
    checkpoint(config, tmp_path / "rcnn.pt")
    checkpoint(tiny("deformable_detr_r50_demo"), tmp_path / "tiny.pt")
    (tmp_path / "there.onnx").write_bytes(b"")
    for source, kind, output, words in (
        ("/none", "onnx", "out.onnx", "'/none' does not exist"),
        ("/none", "onnx", "there.onnx", "exists already"),
        ("/none", "onnx", "out.pt2", "ending in .onnx"),
        ("/none", "torch", "out", "ending in .pt2"),
        ("/none", "safetensors", "none/out.safetensors", "does not exist"),
        ("rcnn.pt", "onnx", "out.onnx", "faster_rcnn"),
        ("rcnn.pt", "torch", "out.pt2", "faster_rcnn"),
        ("rcnn.pt", "transformers", "out", "FasterRCNN"),
        ("tiny.pt", "transformers", "out", "ResNet"),
        ("tiny.pt", "tflite", "out", "tflite"),
    ):
        before = sorted(tmp_path.iterdir())
        assert export(tmp_path / source, "--format", kind, "--output", tmp_path / output) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert words in said.err
        assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_disagrees_is_not_kept(tmp_path, capsys, monkeypatch):
    checkpoint(tiny("deformable_detr_r50_single_scale_demo"), tmp_path / "model.pt")

    def write(detector, path):
        path.write_bytes(b"graph")

    def runner(path):
        assert path.read_bytes() == b"graph"
        return lambda images, sizes: (
            torch.full((len(images), 48), 0.5),
            torch.zeros(len(images), 48, dtype=torch.int64),
            torch.zeros(len(images), 48, 4),
        )

    monkeypatch.setitem(export_module._WRITERS, "onnx", (".onnx", write))
    monkeypatch.setitem(export_module._RUNNERS, "onnx", runner)
    output = tmp_path / "out.onnx"
    assert export(tmp_path / "model.pt", "--format", "onnx", "--output", output) == 2
    assert "does not agree with the checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
