"""A comparison in the terminal, in Markdown and as CSV, and its command."""

import csv
import re

import pytest

from jobs.__main__ import COMMANDS
from jobs.report_text import as_csv, markdown
from pipeline.cli import main
from tests.jobs.made_up_runs import rich_grid, write_run


def command(*arguments):
    return main("python -m jobs", "", COMMANDS, ["compare", *map(str, arguments)])


def test_the_command_writes_its_files_and_ends_with_2_after_a_mistake(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [0.4]), write_run(tmp_path / "b", [0.5], world=1, seed=1)
    assert command(a, b, "--output", tmp_path / "out", "--resamples", 0) == 0
    said = capsys.readouterr().out
    assert re.search(r"^a +1/1 +2 +45\.0 ± 7\.07", said, re.M)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "compare-images.svg", "compare-seconds.svg", "compare.csv", "compare.html", "compare.md",
    ]  # fmt: skip
    assert said.endswith("compare.html, .md, .csv, -images.svg and -seconds.svg\n")
    assert command(tmp_path / "none") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def rich(tmp_path):
    return rich_grid(tmp_path)


def test_csv_is_read_back_unrounded(rich):
    rows = list(csv.DictReader(as_csv(rich).splitlines()))
    assert len(rows) == len(rich.rows)
    for read, row in zip(rows, rich.rows, strict=True):
        assert read["row"] == row.label
        assert read["AP"] == str(row.metrics.get("AP", ""))
        assert read["paper_AP"] == str(row.published.metrics["AP"])
        assert read["source"].startswith("Table 2, row ")


def test_markdown_tables_have_as_many_cells_in_every_line(rich):
    for block in re.findall(r"(?:^\|.*\n)+", markdown(rich), re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "<img" not in re.sub(r"\\<", "", markdown(rich))
