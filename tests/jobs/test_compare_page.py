"""The HTML page of a comparison."""

import re
from html.parser import HTMLParser

import pytest

from jobs.compare import compare
from jobs.measured import read_grid
from jobs.report_html import page
from tests.jobs.made_up_runs import FULL, HOSTILE, cell, rich_grid, write_grid, write_run


@pytest.fixture
def rich(tmp_path):
    return rich_grid(tmp_path)


class Page(HTMLParser):
    """Tags and attributes, and that every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_in_itself_and_takes_no_markup_from_names(rich):
    text = page(rich)
    parsed = Page(text)
    assert parsed.open == []
    tags = [tag for tag, _ in parsed.tags]
    assert "img" not in tags
    assert tags.count("script") == 1
    assert not [a for _, a in parsed.tags if {"src", "href", "srcset"} & set(a)]
    assert not re.findall(r"https?:|url\(|@import", text)
    assert HOSTILE in "".join(parsed.text)
    # Five axes on two scales; one line for each run on each.
    charts = [a["class"] for tag, a in parsed.tags if a.get("class", "").startswith("chart ")]
    assert len(charts) == 10
    style = re.sub(r"\s+", " ", text[: text.index("</style>")])
    for _, axis, scale in map(str.split, charts):  # which the style sheet shows when it is chosen
        shown = f"#{axis}:checked ~ #{scale}:checked ~ .charts .{axis}.{scale}"
        assert shown in style
    lines = [a for _, a in parsed.tags if a.get("class", "").startswith("line ")]
    assert len(lines) == 10 * 4
    first = next(a for a in lines if a["data-name"].endswith("seed 1"))
    assert len(first["data-values"].split()) == 12
    assert "paper 43.8" in text
    headings = re.findall(r"<h2>([^<]*)</h2>", text)
    assert headings == [
        "Published and measured", "AP less the baseline&#x27;s (MS inputs, MS attention, K=4)",
        "Parts of AP: measured (paper)", "AP", "Convergence", "By size, less the baseline",
        "By class, less the baseline", "Configs: what differs (–: as the baseline)",
        "Missing, and to be known", "How to read it",
    ]  # fmt: skip


def test_published_points_are_not_drawn_beside_other_data(tmp_path):
    write_run(tmp_path / "cells/base-42", [0.3, 0.4])
    comparison = compare(read_grid(write_grid(tmp_path, [cell("base", FULL)])), 0)
    assert "paper 43.8" not in page(comparison)
    assert comparison.rows[-1].to_paper is None
    assert "3 classes, not COCO's 80" in comparison.notes[-1]
