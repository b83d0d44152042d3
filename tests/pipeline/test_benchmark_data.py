"""`benchmark-data`: both ways do the same work, and the figures add up."""

import json

import pytest

from pipeline import benchmark_data
from pipeline.__main__ import COMMANDS
from pipeline.cli import main


def run(*arguments: object) -> int:
    return main("python -m pipeline", "", COMMANDS, ["benchmark-data", *map(str, arguments)])


def check(report: dict) -> None:
    for way in report["ways"].values():
        assert way["total"]["low"] <= way["total"]["median"] <= way["total"]["high"]
        assert all(value > 0 for value in way["stages"].values())
        assert way["images_per_second"] == pytest.approx(1000 / way["total"]["median"])
        assert way["without_normalize"]["median"] < way["total"]["median"]
    assert report["agreement"]["images_with_other_boxes"] == 0
    assert report["agreement"]["largest_mean"] < 2
    assert report["speedup"]["median"] > report["speedup_normalized_on_host"]["median"] > 0


def test_drawn_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_data, "ROUNDS", 2)
    output = tmp_path / "data.json"
    assert run("--images", 3, "--size", 240, 320, "--output", output) == 0
    report = json.loads(output.read_text())
    check(report)
    assert report["images"] == 3
    assert "times the official way" in capsys.readouterr().out


def test_shards(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_data, "ROUNDS", 2)
    output = tmp_path / "data.json"
    assert run(drawn.shards / "train", "--images", 5, "--output", output) == 0
    report = json.loads(output.read_text())
    check(report)
    assert str(tmp_path.parent) not in output.read_text()  # no path of this machine


def test_a_drawn_picture_is_of_a_photographs_size():
    """COCO's files of 640x480 are of about 160 kB."""
    sizes = [len(benchmark_data.drawn(seed, 480, 640).image_bytes) for seed in range(3)]
    assert min(sizes) > 100_000
    assert max(sizes) < 180_000


@pytest.mark.parametrize("arguments", [("--images", 0), ("--size", 0, 9), ("no-such-folder",)])
def test_mistakes_are_one_line(capsys, arguments):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
