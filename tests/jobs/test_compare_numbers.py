"""Rows, differences and their noise, by hand."""

import json
import math
import re
import shutil

import numpy as np
import pytest

from jobs.compare import ap_interval, compare
from jobs.grid_augmented import write
from jobs.grid_state import progress
from jobs.measured import read_grid, read_run, read_runs
from jobs.noise import DETECTIONS
from jobs.published import tables
from jobs.report_text import terminal
from pipeline.data.shards import ShardSet
from pipeline.evaluate import ground_truth, summarize
from tests.jobs.made_up_runs import COCO, FULL, cell, row_of, write_grid, write_run

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
    assert re.search(r"FPN +none +– +0/1 +43\.8 +not begun", text)


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


def test_an_augmented_evaluation_is_a_row_beside_its_runs(tmp_path, evaluated):
    cells = [cell("resnext101_dcn", "table3/x101_dcn"), cell("tta", "table3/x101_dcn_tta")]
    trained, augmented = (tmp_path / entry["folder"] for entry in cells)
    evaluated(tmp_path / "other", 0.5)
    found = json.loads((tmp_path / "other" / DETECTIONS).read_text())
    ap = evaluated(trained, 1.5, share=0.6)
    shards = ShardSet(read_run(trained).val)
    evaluation = summarize(ground_truth(shards), found)
    write(augmented, trained, evaluation, 0.0)
    grid = read_grid(write_grid(tmp_path, cells, "table3", baseline="resnext101_dcn"))
    comparison = compare(grid, 100)
    plain, row = row_of(comparison, "resnext101_dcn"), row_of(comparison, "tta")
    assert comparison.rows[-2:] == (plain, row)
    assert plain.metrics["AP"] == pytest.approx(100 * ap)
    assert row.metrics["AP"] == pytest.approx(100 * evaluation.summary["AP"])
    assert row.finished
    assert row.paper_to_baseline == pytest.approx(2.2)
    # Its images are resampled from its own detections, not from the run's.
    assert row.to_baseline.sources == ("images",)
    assert (row.to_baseline.verdict, row.ordering) == ("higher", "as in the paper")
    assert progress(augmented).finished


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
