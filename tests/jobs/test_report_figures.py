"""The figures beside a comparison: whole SVG files, whose curves are the runs'."""

import re
from xml.etree import ElementTree

import pytest

from jobs.charts import Line, curves
from jobs.compare import compare
from jobs.measured import read_grid
from jobs.report_figures import LETTERS, _document, figures
from tests.jobs.made_up_runs import HOSTILE, cell, write_grid, write_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def grid(tmp_path):
    """A fast cell with two thirds of the slow one's AP, each evaluated three times."""
    write_run(tmp_path / "slow", [0.1, 0.2, 0.3], step_hours=1.0)
    write_run(tmp_path / "fast", [0.1, 0.15, 0.2], step_hours=0.25)
    cells = [cell("slow", folder="slow"), cell(f"fast {HOSTILE}"[:80], folder="fast")]
    return write_grid(tmp_path, cells, baseline="slow")


def test_curves_are_over_images_seen_and_over_seconds(grid):
    drawn = figures(compare(read_grid(grid), 0))
    assert list(drawn) == ["images", "seconds"]
    for axis, steps in (
        ("images", {"slow": 320, "fast": 320}),
        ("seconds", {"slow": 3600, "fast": 900}),
    ):
        root = ElementTree.fromstring(drawn[axis])
        lines = {e.get("data-name", "")[:4]: e for e in root.iter(f"{SVG}g") if e.get("data-name")}
        for name, step in steps.items():
            values = [
                tuple(map(float, p.split(","))) for p in lines[name].get("data-values").split()
            ]
            assert [x for x, _ in values] == pytest.approx([step, 2 * step, 3 * step])
        legend = [
            text
            for e in root.iter(f"{SVG}text")
            if (text := e.text) and re.match(r"\d+\.\d  ", text)
        ]
        assert [entry[:10] for entry in legend] == ["30.0  slow", "20.0  fast"]
        assert len(legend[1]) == 6 + LETTERS
        assert "AP" in [e.text for e in root.iter(f"{SVG}text")]


def test_many_lines_are_told_apart():
    lines = [Line(f"method {i}", i, [(1.0, 1.0), (2.0, float(i))]) for i in range(24)]
    root = ElementTree.fromstring(_document(curves(lines, [], "images", "AP", False), lines))
    classes = [e.get("class") for e in root.iter(f"{SVG}g") if e.get("data-name")]
    assert len(set(classes)) == 24
    style = next(root.iter(f"{SVG}style")).text
    assert "var(" not in style
    for name in {name for names in classes for name in names.split()} - {"line"}:
        assert re.search(rf"\.{name} polyline {{", style), name
    height = float(root.get("viewBox").split()[3])
    assert all(float(e.get("y")) < height for e in root.iter(f"{SVG}text"))


def test_without_an_evaluation_there_is_no_figure(tmp_path):
    write_run(tmp_path / "cells/base-42", [])
    assert figures(compare(read_grid(write_grid(tmp_path, [cell("base")])), 0)) == {}
