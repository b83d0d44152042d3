"""`benchmark-predict` on small models: what it reports, and what it refuses."""

import json
from dataclasses import replace

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.benchmark_predict import _spread
from pipeline.cli import main
from tests.pipeline.export_cases import checkpoint, tiny


def benchmark(*arguments: object) -> int:
    return main("python -m pipeline", "", COMMANDS, ["benchmark-predict", *map(str, arguments)])


def test_our_model_beside_transformers(tmp_path, capsys):
    config = tiny("deformable_detr_r50_single_scale_demo", backbone="resnet50")
    checkpoint(config, tmp_path / "model.pt")
    output = tmp_path / "predict.json"
    options = ("--size", 64, 96, "--batch-sizes", 1, 2, "--repeats", 2, "--device", "cpu")
    beside = ("--beside", "transformers", "--output", output)
    assert benchmark(tmp_path / "model.pt", *options, *beside) == 0
    table = capsys.readouterr().out
    assert "64x96, batch 2, fp32" in table
    assert "transformers" in table
    report = json.loads(output.read_text())
    assert [work["batch_size"] for work in report["workloads"]] == [1, 2]
    assert "transformers" in report["versions"]
    assert report["threads"] >= 1
    for work in report["workloads"]:
        ours, theirs = work["contenders"]
        assert (ours["contender"], theirs["contender"]) == ("ours", "transformers")
        assert ours["score_difference"] == 0
        assert theirs["score_difference"] < 2e-3  # it computes the same
        assert ours["times_ours"]["median"] == 1
        for row in (ours, theirs):
            latency = row["latency"]
            assert 0 < latency["low"] <= latency["median"] <= latency["p90"] <= latency["high"]
            rate = 1000 * work["batch_size"] / latency["median"]
            assert row["images_per_second"] == pytest.approx(rate)


def test_the_ninetieth_percentile():
    assert _spread([float(x) for x in range(10, 0, -1)]) == {
        "median": 5.5, "p90": 9, "low": 1, "high": 10,
    }  # fmt: skip
    assert _spread([3.0])["p90"] == 3


def test_mistakes_are_one_line(tmp_path, capsys):
    rcnn = tiny("faster_rcnn_r50_fpn_demo")
    checkpoint(replace(rcnn, seed=1), tmp_path / "rcnn.pt")
    for arguments, words in (
        (("runs/none",), "expected a checkpoint, or a recipe"),
        (("deformable_detr_r51",), "deformable_detr_r50"),
        (("demo", "--batch-sizes", 0), "1 or more"),
        (("demo", "--repeats", 0), "1 or more"),
        (("demo", "--beside", "onnx", "onnx"), "each once"),
        (("demo", "--beside", "detrex"), "detrex"),
        (("demo", "--size", 8, 640), "65 or more"),
        (("demo", "--precision", "bf16", "--beside", "onnx"), "fp32"),
        (("demo", "--output", "/none/there.json"), "does not exist"),
        (("demo", "--beside", "transformers"), "ResNet"),
        ((tmp_path / "rcnn.pt", "--beside", "torch"), "faster_rcnn"),
    ):
        assert benchmark(*arguments, "--device", "cpu") == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1
        assert words in said.err
