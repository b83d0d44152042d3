"""Comparisons of made-up run folders: numbers by hand, broken folders, and the pages' text."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.charts import Line, Mark, Spot, bars, curves, log_ticks, spots, ticks
from jobs.compare import ap_interval, compare, open_targets, report
from jobs.measured import read_grid, read_run, read_runs
from jobs.noise import DETECTIONS
from jobs.published import METRICS, published, tables
from jobs.report_html import page
from jobs.report_text import as_csv, markdown, terminal
from pipeline.data.shards import ShardSet
from pipeline.errors import UserError
from pipeline.evaluate import ground_truth, summarize
from tests.jobs.made_up_runs import COCO, cell, write_grid, write_run

FULL = "table2/ms_attention_k4"


def row_of(comparison, name):
    return next(row for row in comparison.rows if row.cell and row.cell.name == name)


# The paper's numbers


def test_the_paper_has_8_6_and_9_rows_and_each_is_consistent():
    assert {name: len(table.rows) for name, table in tables().items()} == {
        "table1": 8, "table2": 6, "table3": 9, "figure3": 3,
    }  # fmt: skip
    for row in (row for table in tables().values() for row in table.rows):
        values = row.metrics
        assert set(values) >= {"AP", "AP50", "AP75"}, row.key
        assert values["AP75"] < values["AP50"], row.key
        assert values["AP"] < values["AP50"], row.key
        assert 0 < min(values.values()) <= max(values.values()) < 100
        if "AP_S" in values:
            assert values["AP_S"] < values["AP_M"] < values["AP_L"], row.key
        else:
            assert row.key == "table3/efficientdet_d7"
        assert published(row.key) == row


def test_the_differences_that_the_paper_states_in_words_follow_from_its_tables():
    def ap(key, metric="AP"):
        return published(key).metrics[metric]

    def less(a, b, metric="AP"):
        return round(ap(a, metric) - ap(b, metric), 1)

    # Section 5.2: multi-scale inputs give 1.7 AP and 2.9 AP_S, more points 0.9, attention over
    # levels 1.5.
    assert less("table2/ms_inputs_k1", "table2/single_scale_k1") == 1.7
    assert less("table2/ms_inputs_k1", "table2/single_scale_k1", "AP_S") == 2.9
    assert less("table2/ms_inputs_k4", "table2/ms_inputs_k1") == 0.9
    assert less(FULL, "table2/ms_inputs_k4") == 1.5
    # One model in two tables.
    assert published(FULL).metrics == published("table1/deformable_detr").metrics
    # Section 5.3: 48.7, 49.0, 50.1 and 52.3.
    ours = ("r101", "x101", "x101_dcn", "x101_dcn_tta")
    assert [ap(f"table3/{name}") for name in ours] == [48.7, 49.0, 50.1, 52.3]
    # Section 5.1: ten times fewer epochs, 1.6 times as fast as DETR-DC5, 25% slower than FPN's.
    rows = [published(f"table1/{name}") for name in ("deformable_detr", "detr_dc5")]
    assert rows[1].epochs == 10 * rows[0].epochs
    speed = [published(f"table1/{n}").extra["fps"] for n in ("deformable_detr", "faster_rcnn_fpn")]
    assert round(speed[0] / rows[1].extra["fps"], 1) == 1.6
    assert speed[0] / speed[1] == pytest.approx(0.75, abs=0.03)
    # The hours of DETR-DC5 are those of its epochs.
    hours = [published(f"table1/{name}").extra["gpu_hours"] for name in ("detr_dc5", "detr_dc5_50")]
    assert hours[0] == 10 * hours[1]


def test_an_unknown_row_names_the_nearest():
    with pytest.raises(UserError, match=r"'table2/ms_attention_k5': did you mean '.*_k4'\?"):
        published("table2/ms_attention_k5")


# Reading


def test_a_run_gives_its_curve_its_best_and_its_hours(tmp_path):
    run = read_run(write_run(tmp_path / "run", [0.1, 0.3, 0.2], world=4, step_hours=0.5, seed=7))
    assert (run.seed, run.epochs, run.epoch, run.finished, run.problems) == (7, 3, 3.0, True, ())
    assert [p.metrics["AP"] for p in run.curve] == pytest.approx([10, 30, 20])
    assert [p.hours for p in run.curve] == pytest.approx([0.5, 1.0, 1.5])
    assert [p.device_hours for p in run.curve] == pytest.approx([2, 4, 6])
    assert (run.best.epoch, run.best.per_class["car"]) == (2.0, pytest.approx(30))


def test_time_between_a_stop_and_the_next_start_is_not_training(tmp_path):
    lines = [
        {"kind": "event", "event": "start", "step": 0, "epoch": 0.0, "time": 0.0, "world": 2},
        {"kind": "train", "step": 5, "epoch": 0.5, "time": 3600.0},
        {"kind": "event", "event": "start", "step": 5, "epoch": 0.5, "time": 90000.0, "world": 4},
        {"kind": "train", "step": 6, "epoch": 0.6, "time": 89000.0},  # another node's clock
        {"kind": "evaluation", "step": 10, "epoch": 1.0, "time": 92600.0, "AP": 0.2},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (point,) = read_run(tmp_path).curve
    assert (point.hours, point.device_hours) == (pytest.approx(2), pytest.approx(1 * 2 + 1 * 4))


def test_undefined_metrics_are_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "run", [0.5], parts={"AP_L": -2.0}))  # pycocotools' -1
    assert set(run.best.metrics) == set(METRICS) - {"AP_L"}


def test_torn_files_cost_only_what_they_held(tmp_path):
    folder = write_run(tmp_path / "run", [0.1, 0.3, 0.2])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = [*lines[:4], lines[4][:30] + "\n", *lines[5:], '{"kind": "evaluation", "step": 3']
    (folder / "metrics.jsonl").write_text("".join(torn))  # without the second evaluation
    (folder / "evaluations" / "step-00000040.json").write_text("{")
    run = read_run(folder)
    assert [p.metrics["AP"] for p in run.curve] == pytest.approx([10, 30, 20])
    assert [p.hours is None for p in run.curve] == [False, True, False]
    assert run.best.epoch == 2
    assert len(run.problems) == 2
    assert "2 of 8 lines are torn" in run.problems[0]


@pytest.mark.parametrize("content", ["null", "[]", '{"kind": 3}', '{"kind": "train"}', "\x00", "7"])
def test_lines_that_are_no_metrics_are_counted_as_torn(tmp_path, content):
    folder = write_run(tmp_path / "run", [0.1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(content + "\n")
    run = read_run(folder)
    assert len(run.curve) == 1
    assert "1 of 4 lines" in run.problems[0]


def everywhere(value, path=()):
    """The path of every part of a JSON value."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from everywhere(part, (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], junk)
    return copy


JUNK = (None, [], {}, "x", -1, True, float("nan"), [1, 2], {"a": 1}, 10**400)


@pytest.mark.parametrize("name", ["config.json", "evaluations/step-00000030.json", "metrics.jsonl"])
def test_junk_anywhere_in_a_runs_files_breaks_no_comparison(tmp_path, name):
    good = write_run(tmp_path / "good", [0.3, 0.4])
    folder = write_run(tmp_path / "bad", [0.1, 0.2], world=1, model={"levels": 4})
    lines = (folder / name).read_text().splitlines() if name.endswith("l") else None
    if name.startswith("evaluations"):  # one that the log does not have
        shutil.copy(folder / "evaluations" / "step-00000020.json", folder / name)
    whole = json.loads((folder / name).read_text()) if lines is None else json.loads(lines[-1])
    for path in list(everywhere(whole)):
        for junk in JUNK:
            text = json.dumps(replaced(whole, path, junk))
            text = text if lines is None else "\n".join([*lines[:-1], text, ""])
            (folder / name).write_text(text)
            comparison = compare(read_runs([good, folder]), 0)
            for write in (terminal, markdown, as_csv, page):
                assert "good" in write(comparison), (path, junk)


# Rows, differences and noise


def test_a_table_has_the_papers_rows_in_order_with_the_cells_beside_them(tmp_path):
    folder = tmp_path / "grid"
    write_run(folder / "cells/base-42", [0.2, 0.44], classes=COCO)
    write_run(folder / "cells/half-42", [0.3], epochs=50, classes=COCO)
    cells = [
        cell("base", FULL), cell("half", "table2/ms_inputs_k4"), cell("none", "table2/fpn"),
        cell("own"),
    ]  # fmt: skip
    write_run(folder / "cells/own-42", [0.5], classes=COCO)
    comparison = compare(read_grid(write_grid(folder, cells, baseline="base")), 0)
    labels = [row.label for row in comparison.rows]
    assert labels == [*(row.label for row in tables()["table2"].rows), "own"]
    base, half = row_of(comparison, "base"), row_of(comparison, "half")
    assert base.metrics["AP"] == pytest.approx(44)
    assert base.to_paper.value == pytest.approx(0.2)
    assert base.to_baseline is None
    assert half.to_baseline.value == pytest.approx(-14)
    assert half.paper_to_baseline == pytest.approx(-1.5)
    assert not half.finished
    assert row_of(comparison, "none").metrics == {}
    said = "\n".join(comparison.notes)
    assert "none: nothing measured yet" in said
    assert "half: not finished: epoch 1 of 50 (seed 42)" in said
    assert "published alone, no cell of this grid: MS inputs, MS attention, K=4, BiFPN" in said
    text = terminal(comparison)
    assert re.search(r"MS inputs, K=4 +half +1/50 +1 +42\.3 +30\.0 .*unfinished", text)
    assert re.search(r"FPN +none +– +0/1 +43\.8 +missing", text)


def test_seeds_give_mean_deviation_and_the_noise_of_differences(tmp_path):
    folder = tmp_path / "grid"
    cells = []
    for name, key, aps in (
        ("base", FULL, (0.40, 0.42)),
        ("near", "table2/ms_inputs_k4", (0.415, 0.435)),
        ("far", "table2/ms_inputs_k1", (0.30, 0.32)),
        ("one", "table2/single_scale_k1", (0.35,)),
    ):
        for seed, ap in enumerate(aps):
            cells.append(cell(name, key, seed))
            write_run(folder / cells[-1]["folder"], [ap], seed=seed, classes=COCO)
    comparison = compare(read_grid(write_grid(folder, cells, baseline="base")), 0)
    base, near, far, one = (row_of(comparison, n) for n in ("base", "near", "far", "one"))
    assert base.metrics["AP"] == pytest.approx(41)
    assert base.spread == pytest.approx(math.sqrt(2))
    # Three cells of two seeds: each has variance 2 with 1 degree of freedom, so 2 with 3.
    assert comparison.spread.deviation == pytest.approx(math.sqrt(2))
    assert (comparison.spread.freedom, comparison.spread.cells) == (3, 3)
    said = "standard deviation of 1.41 (pooled over 3 cells, degrees of freedom: 3)"
    assert said in terminal(comparison)
    half = 3.182446 * math.sqrt(2) * math.sqrt(1 / 2 + 1 / 2)  # Student's t, 3 degrees, 97.5%
    assert near.to_baseline.low == pytest.approx(1.5 - half, abs=1e-5)
    assert near.to_baseline.high == pytest.approx(1.5 + half, abs=1e-5)
    assert (near.to_baseline.verdict, near.ordering) == ("noise", "undecided")
    assert (far.to_baseline.verdict, far.ordering) == ("lower", "as in the paper")
    # A cell of one seed varies as the others do: its own mean is of one run.
    width = one.to_baseline.high - one.to_baseline.low
    assert width == pytest.approx(2 * 3.182446 * math.sqrt(2) * math.sqrt(1 + 1 / 2), abs=1e-5)
    # To the paper: two runs here, one there.
    assert base.to_paper.high - base.to_paper.value == pytest.approx(
        3.182446 * math.sqrt(2) * math.sqrt(1 / 2 + 1), abs=1e-5
    )


def test_without_seeds_or_detections_noise_is_not_known(tmp_path):
    write_run(tmp_path / "a", [0.4])
    write_run(tmp_path / "b", [0.5], model={"num_points": 1})
    comparison = compare(read_runs([tmp_path / "a", tmp_path / "b"]), 100)
    assert row_of(comparison, "b").to_baseline.verdict == "not known"
    assert "2 of 2 runs have no evaluations/best-detections.json" in comparison.notes[0]


def test_nothing_is_judged_beside_an_unfinished_baseline(tmp_path):
    folder = tmp_path / "grid"
    cells = [cell("base", FULL), *(cell("done", "table2/ms_inputs_k4", seed) for seed in (1, 2))]
    write_run(folder / cells[0]["folder"], [0.2], epochs=2)
    for entry in cells[1:]:
        write_run(folder / entry["folder"], [0.3 + entry["seed"] / 100], seed=entry["seed"])
    comparison = compare(read_grid(write_grid(folder, cells, baseline="base")), 0)
    row = row_of(comparison, "done")
    assert row.to_baseline.verdict == "higher"
    assert row.ordering == "undecided"
    assert re.search(
        r"MS inputs, K=4 +-1\.5 +\+11\.5 .* unfinished +undecided", terminal(comparison)
    )


def test_cells_that_share_runs_are_the_same_run_and_count_once(tmp_path):
    folder = tmp_path / "grid"
    cells = [cell("resnet50", "table3/r50", s, f"runs/{s}") for s in (1, 2)]
    cells += [cell("resnet101", "table3/r101", s, f"runs/{s}") for s in (1, 2)]
    for seed, ap in ((1, 0.40), (2, 0.42)):
        write_run(folder / f"runs/{seed}", [ap], seed=seed)
    grid = read_grid(write_grid(folder, cells, "table3_demo", baseline="resnet50"))
    comparison = compare(grid, 0)
    assert comparison.title.endswith(", at demo scale")
    assert len(comparison.rows) == 9  # the paper's
    assert (comparison.spread.freedom, comparison.spread.cells) == (1, 1)
    row = row_of(comparison, "resnet101")
    assert (row.to_baseline.verdict, row.ordering) == ("same run", "undecided")


def test_an_unfinished_seed_does_not_count_beside_finished_ones(tmp_path):
    folder = tmp_path / "grid"
    cells = [cell("base", FULL, seed) for seed in (1, 2, 3)]
    write_run(folder / cells[0]["folder"], [0.2, 0.4], seed=1)
    write_run(folder / cells[1]["folder"], [0.1], epochs=2, seed=2)
    comparison = compare(read_grid(write_grid(folder, cells)), 0)
    row = row_of(comparison, "base")
    assert row.metrics["AP"] == pytest.approx(40)
    assert "1/3" in terminal(comparison)
    assert any("epoch 1 of 2 (seed 2), epoch 0 (seed 3)" in note for note in comparison.notes)


# Detections: the bootstrap


@pytest.fixture(scope="module")
def evaluated(drawn):
    """`evaluated(folder, noise)`: a run whose detections are the drawn data's objects, moved."""
    shards = ShardSet(drawn.shards / "val")
    truth = ground_truth(shards)

    def write(folder, noise, seed=0, share=1.0):
        random = np.random.default_rng(seed)
        detections = []
        for a in truth.dataset["annotations"]:
            if random.random() < share:
                box = np.asarray(a["bbox"]) + random.normal(size=4) * noise
                record = {key: a[key] for key in ("image_id", "category_id")}
                score = float(random.random())
                detections.append({**record, "bbox": np.maximum(box, 1).tolist(), "score": score})
        ap = summarize(truth, detections).summary["AP"]
        write_run(folder, [ap], val=shards.folder, val_digest=shards.digest, seed=seed)
        (folder / DETECTIONS).write_text(json.dumps(detections))
        return ap

    return write


def test_detections_give_intervals_over_images_and_paired_differences(tmp_path, evaluated):
    folder = tmp_path / "grid"
    cells = [cell("base", FULL), cell("same", "table2/fpn"), cell("worse", "table2/ms_inputs_k4")]
    ap = 100 * evaluated(folder / cells[0]["folder"], 1.5)
    evaluated(folder / cells[1]["folder"], 1.5)
    evaluated(folder / cells[2]["folder"], 1.5, share=0.5)
    comparison = compare(read_grid(write_grid(folder, cells, baseline="base")), 300)
    base, same, worse = (row_of(comparison, name) for name in ("base", "same", "worse"))
    assert base.interval[0] < ap < base.interval[1]
    assert base.interval[1] - base.interval[0] > 1
    # The same detections: no resample tells the two apart, and that is what pairing is for.
    assert (same.to_baseline.low, same.to_baseline.high) == pytest.approx((0, 0))
    assert same.to_baseline.verdict == "noise"
    assert worse.to_baseline.sources == ("images",)
    assert (worse.to_baseline.verdict, worse.ordering) == ("lower", "as in the paper")
    assert not [note for note in comparison.notes if "interval" in note]


def test_the_interval_of_an_ap_is_a_percentage():
    drawn = np.linspace(0.0, 4.0, 101)
    assert ap_interval(drawn, 1.0) == (0.0, pytest.approx(2.9))
    assert ap_interval(drawn, 99.5) == (pytest.approx(97.6), 100.0)


def test_noise_of_images_and_of_seeds_adds_in_squares(tmp_path, evaluated, monkeypatch):
    folder = tmp_path / "grid"
    cells = [cell(name, None, seed) for name in ("base", "other") for seed in (1, 2)]
    for entry, share in zip(cells, (0.9, 0.8, 0.6, 0.7), strict=True):
        evaluated(folder / entry["folder"], 1.5, entry["seed"], share)
    grid = read_grid(write_grid(folder, cells, "mine", baseline="base"))
    both = row_of(compare(grid, 100), "other").to_baseline
    seeds = row_of(compare(grid, 0), "other").to_baseline
    monkeypatch.setattr("jobs.compare.seed_spread", lambda grid: None)
    images = row_of(compare(grid, 100), "other").to_baseline
    assert [d.sources for d in (both, seeds, images)] == [
        ("images", "seeds"), ("seeds",), ("images",),
    ]  # fmt: skip
    assert images.low < images.value < images.high
    for side in ("low", "high"):
        widths = [abs(getattr(d, side) - d.value) for d in (both, seeds, images)]
        assert min(widths) > 0.5
        assert widths[0] == pytest.approx(math.hypot(widths[1], widths[2]))


def test_detections_of_another_evaluation_or_other_data_are_refused_and_named(tmp_path, evaluated):
    folders = [tmp_path / name for name in ("stale", "torn", "moved", "other")]
    for i, folder in enumerate(folders):
        evaluated(folder, 1.0 + i)
    shutil.copy(folders[3] / DETECTIONS, folders[0] / DETECTIONS)
    (folders[1] / DETECTIONS).write_text('[{"image_id": 1')
    config = json.loads((folders[2] / "config.json").read_text())
    config["config"]["data"]["val"] = str(tmp_path / "gone")
    (folders[2] / "config.json").write_text(json.dumps(config))
    foreign = json.loads((folders[3] / DETECTIONS).read_text())
    (folders[3] / DETECTIONS).write_text(json.dumps([{**foreign[0], "image_id": 10**9}]))
    for folder, said in zip(
        folders,
        ("they are of another evaluation", "no COCO result", "gone", "no COCO result"),
        strict=True,
    ):
        comparison = compare(read_runs([folder]), 10)
        assert comparison.rows[0].interval is None
        assert comparison.rows[0].metrics["AP"] > 0
        assert [n for n in comparison.notes if said in n and "no interval over images" in n], said
    # The shards are elsewhere now: --val says where.
    shards = json.loads((folders[0] / "config.json").read_text())["config"]["data"]["val"]
    assert compare(read_runs([folders[2]]), 10, val=shards).rows[0].interval is not None


# Run folders without a grid


def test_runs_that_differ_in_the_seed_alone_are_one_cell(tmp_path):
    folders = [
        write_run(tmp_path / "x" / "run", [0.4], seed=1, engine={"precision": "bf16"}),
        write_run(tmp_path / "y" / "run", [0.5], seed=2, engine={"precision": "bf16", "log": 1}),
        write_run(tmp_path / "y" / "fp32", [0.6], seed=1, engine={"precision": "fp32"}),
    ]
    grid = read_runs(folders)
    assert [(c.name, len(c.runs)) for c in grid.cells] == [("x/run", 2), ("fp32", 1)]
    assert grid.cells[1].differences == {"engine.precision": ("bf16", "fp32")}
    assert grid.baseline == "x/run"
    again = write_run(tmp_path / "again", [0.45], seed=1, engine={"precision": "bf16"})
    names = [(c.name, len(c.runs)) for c in read_runs([*folders, again]).cells]
    assert names == [("x/run", 2), ("fp32", 1), ("again", 1)]


def test_runs_on_different_data_are_not_held_against_each_other(tmp_path):
    write_run(tmp_path / "a", [0.4])
    write_run(tmp_path / "b", [0.5], val_digest="other")
    comparison = compare(read_runs([tmp_path / "a", tmp_path / "b"]), 0)
    assert row_of(comparison, "b").to_baseline is None
    assert "different data: their APs do not compare" in comparison.notes[-1]


def test_what_is_no_run_is_named_and_the_rest_is_compared(tmp_path, capsys):
    run = write_run(tmp_path / "run", [0.4])
    (tmp_path / "other").mkdir()
    targets = (str(run), str(tmp_path / "other"), str(tmp_path / "gone"), str(run))
    with pytest.raises(UserError) as told:
        report(targets, tmp_path / "out", "", 0)
    message = str(told.value)
    assert "other: not a run folder (it has no config.json)" in message
    assert "gone: not a run folder (there is no such folder)" in message
    assert "run: given twice" in message
    assert "\n" not in message
    assert "40.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "compare.html").exists()
    with pytest.raises(UserError, match="not a run folder"):
        open_targets((str(tmp_path / "other"),))


# Grids with mistakes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g.update(cells={}), "cells: got {}, expected list"),
        (lambda g: g.update(baselin="base"), "unknown field 'baselin': did you mean 'baseline'?"),
        (lambda g: g.pop("name"), "name is missing"),
        (lambda g: g.update(name=True), "name: got True, expected str"),
    ],
)
def test_a_grid_file_that_is_wrong_as_a_whole_is_one_line(tmp_path, change, said):
    write_grid(tmp_path, [cell("base", FULL)], baseline="base")
    grid = json.loads((tmp_path / "grid.json").read_text())
    change(grid)
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError) as told:
        read_grid(tmp_path)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_a_grid_file_that_is_no_json_is_one_line(tmp_path):
    (tmp_path / "grid.json").write_text('{"name": "table2",')
    with pytest.raises(UserError, match=r"grid\.json: not JSON"):
        read_grid(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (cell("new", "table2/ms_atention_k4"), "did you mean 'table2/ms_attention_k4'?"),
        ({**cell("new"), "folders": "x"}, "unknown field 'folders': did you mean 'folder'?"),
        ({**cell("new"), "seed": "1"}, "seed: got '1', expected int"),
        (cell("new", differences={"model.x": 3}), "model.x: got 3, expected [baseline's value"),
        ("new", "got a str, expected an object"),
        (cell("fine", folder="x"), "cell 3 (fine): a second one of this name with seed 42"),
    ],
)
def test_a_wrong_cell_is_named_and_the_finished_ones_are_shown(tmp_path, capsys, wrong, said):
    write_run(tmp_path / "cells/fine-42", [0.44])
    write_run(tmp_path / "cells/done-42", [0.44])
    cells = [cell("fine", FULL), cell("done", "table2/fpn"), wrong]
    write_grid(tmp_path, cells, baseline="fine")
    with pytest.raises(UserError) as told:
        report((str(tmp_path),), None, "", 0)
    assert said in str(told.value)
    assert re.search(r"fine +1/1 +1 +43\.8 +44\.0", capsys.readouterr().out)
    assert said.replace("'", "&#x27;") in (tmp_path / "compare.html").read_text()


def test_a_baseline_that_is_no_cell_names_the_nearest(tmp_path):
    grid = read_grid(write_grid(tmp_path, [cell("baseline", FULL)], baseline="base_line"))
    assert grid.baseline is None
    assert "'base_line' is no cell: did you mean 'baseline'?" in grid.mistakes[0]


def test_a_grid_that_was_not_submitted_says_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"submit it with: python -m jobs grid table2"):
        open_targets(("table2",))
    with pytest.raises(UserError, match=r"python -m jobs grid figure3 --scale demo"):
        open_targets(("outputs/grids/figure3_demo",))
    write_grid(tmp_path / "outputs/grids/table2", [cell("base", FULL)])
    assert open_targets(("table2",)).name == "table2"
    with pytest.raises(UserError, match="one grid alone"):
        open_targets(("outputs/grids/table2", "run"))
    with pytest.raises(UserError, match="expected a grid"):
        open_targets(())


def test_a_grid_of_which_nothing_ran_is_all_missing(tmp_path):
    grid = read_grid(write_grid(tmp_path, [cell("base", FULL)], baseline="base"))
    comparison = compare(grid, 10)
    assert not any(row.metrics for row in comparison.rows)
    for text in (terminal(comparison), markdown(comparison), page(comparison)):
        assert "missing" in text


# The command


def test_the_command_writes_its_files_and_ends_with_2_after_a_mistake(tmp_path, run_command):
    a, b = write_run(tmp_path / "a", [0.4]), write_run(tmp_path / "b", [0.5], world=1, seed=1)
    done = run_command("jobs", "compare", a, b, "--output", tmp_path / "out", "--resamples", 0)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^a +1/1 +2 +45\.0 ± 7\.07", done.stdout, re.M)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["compare.csv", "compare.html", "compare.md"]
    done = run_command("jobs", "compare", tmp_path / "none")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


# Reports


HOSTILE = '</script><img src=x onerror=alert(1)> & "q" | `c` *'


@pytest.fixture
def rich(tmp_path):
    """A grid with seeds, COCO's number of classes, names full of markup, and a missing cell."""
    classes = [HOSTILE, *(f"class {i}" for i in range(79))]
    cells = []
    random = np.random.default_rng(0)
    for name, key, top in (("base", FULL, 0.43), (HOSTILE, "table2/ms_inputs_k4", 0.41)):
        for seed in (1, 2):
            folder = f"cells/{key.split('/')[1]}-{seed}"
            cells.append(cell(name, key, seed, folder, {"model.num_points": [4, HOSTILE]}))
            curve = (top + random.normal() * 0.002) * (1 - np.exp(-np.arange(1, 13) / 3))
            lift = {c: random.normal() * 0.02 for c in classes}
            write_run(tmp_path / folder, curve.tolist(), seed=seed, classes=classes, lift=lift)
    cells.append(cell("gone", "table2/fpn"))
    return compare(read_grid(write_grid(tmp_path, cells, baseline="base")), 0)


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
    # Four axes on two scales; one line for each run on each.
    charts = [a["class"] for tag, a in parsed.tags if a.get("class", "").startswith("chart ")]
    assert len(charts) == 8
    lines = [a for _, a in parsed.tags if a.get("class", "").startswith("line ")]
    assert len(lines) == 8 * 4
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


# Charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_are_few_even_and_round_what_is_shown(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0], rtol=1e-3)
    assert found[0] <= low + steps[0] * 1e-3
    assert found[-1] >= low + span - steps[0] * 1e-3


@pytest.mark.parametrize(("low", "high"), [(1, 500), (0.004, 0.005), (1, 1), (3697, 1.8e6)])
def test_logarithmic_ticks_lie_between_the_two(low, high):
    found = log_ticks(low, high)
    assert found == sorted(set(found))
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in found)
    assert found


def test_a_curve_goes_through_its_points():
    line = Line("a", 0, [(1.0, 0.0), (10.0, 20.0), (100.0, 40.0)])
    for log in (False, True):
        svg = curves([line], [], "epochs", "AP", log)
        (points,) = re.findall(r'<polyline points="([^"]*)"', svg)
        places = [tuple(map(float, point.split(","))) for point in points.split()]
        (x0, y0), (x1, y1), (x2, y2) = places
        assert y0 > y1 > y2
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
        expected = 1.0 if log else (10 - 1) / (100 - 10)  # equal steps of a logarithmic axis
        assert (x1 - x0) / (x2 - x1) == pytest.approx(expected, abs=0.01)


def test_charts_without_numbers_are_not_drawn():
    assert curves([], [], "epochs", "AP", False) == ""
    assert curves([Line("a", 0, [(0.0, 1.0)])], [], "epochs", "AP", True) == ""
    assert bars([], "points of AP") == ""


def test_labels_of_marks_keep_their_distance():
    line = Line("a", 0, [(1.0, 40.0), (50.0, 44.0)])
    marks = [Mark(f"paper {ap}", 0, 50.0, ap, "paper") for ap in (43.8, 43.9, 43.7, 42.3)]
    svg = curves([line], marks, "epochs", "AP", False)
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)">paper', svg))
    assert len(heights) == 4
    assert min(np.diff(heights)) >= 14.9


def test_spots_lie_where_their_values_are():
    rows = [Spot("a", 0, [40.0, 41.0], (39.0, 43.0), 42.0), Spot("b", 1, [], None, None)]
    svg = spots(rows, "AP")
    a, b = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    low, high = map(float, re.search(r'span" d="M([\d.]+) [\d.]+H([\d.]+)"', svg).groups())
    (paper,) = map(float, re.findall(r'paper" d="M([\d.]+)', svg))
    places = np.array([low, a, b, paper, high])  # 39 to 43
    np.testing.assert_allclose(np.diff(places), places[1] - places[0], atol=0.2)
    assert spots([Spot("b", 1, [], None, 40.0)], "AP") == ""


def test_bars_are_as_long_as_their_values():
    svg = bars([("up", 2.0), ("down", -1.0), ("none", 0.0)], "points of AP")
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[2] < 1
