"""What a comparison reads: the paper's numbers, run folders and grids, broken ones too."""

import json
import re
import shutil

import pytest

from jobs.compare import compare, open_targets, report
from jobs.measured import read_grid, read_run, read_runs
from jobs.published import METRICS, published, tables
from jobs.report_html import page
from jobs.report_text import as_csv, markdown, terminal
from pipeline.errors import UserError
from pipeline.recipes import recipe
from tests.jobs.made_up_runs import FULL, cell, row_of, write_grid, write_run

# The paper's numbers


def test_the_paper_has_8_6_and_9_rows_and_each_is_consistent():
    assert {name: len(table.rows) for name, table in tables().items()} == {
        "table1": 8, "table2": 6, "table3": 9, "recipe12": 7, "figure3": 3, "family": 18,
        "family_variants": 15,
    }  # fmt: skip
    of_papers = [table for name, table in tables().items() if not name.startswith("family")]
    for row in (row for table in of_papers for row in table.rows):
        values = row.metrics
        if set(values) == {"AP"}:
            assert row.source == "README of github.com/HDETR/H-Deformable-DETR"
            continue
        assert set(values) >= {"AP", "AP50", "AP75"}, row.key
        assert values["AP75"] < values["AP50"], row.key
        assert values["AP"] < values["AP50"], row.key
        assert 0 < min(values.values()) <= max(values.values()) < 100
        if "AP_S" in values:
            assert values["AP_S"] < values["AP_M"] < values["AP_L"], row.key
        else:
            assert row.key == "table3/efficientdet_d7"
        assert published(row.key) == row


def test_the_familys_rows_are_those_of_its_repositories():
    """As the notes on the family have them: epochs, AP, millions of parameters."""
    rows = {row.key.removeprefix("family/"): row for row in tables()["family"].rows}
    for row in rows.values():
        assert row.source.startswith(("README of github.com/", "arXiv "))
        assert 35 < row.extra["params"] < 60
    known = {name: (row.epochs, row.metrics["AP"]) for name, row in rows.items()}
    assert {epochs for epochs, _ in known.values()} == {50, 12}
    assert [name for name, (epochs, _) in known.items() if epochs == 12] == ["dino_r50_4scale"]
    # Each method's stride-16 map is worth more than one AP, and so is SMCA to SAM-DETR.
    dc5 = [name for name in known if f"{name}_dc5" in known]
    smca = [name for name in known if f"{name}_smca" in known]
    assert (len(dc5), len(smca)) == (5, 3)
    for name in dc5:
        assert known[f"{name}_dc5"][1] > known[name][1] + 1
    for name in smca:
        assert known[f"{name}_smca"][1] >= known[name][1] + 1


def test_the_familys_variants_stand_to_its_recipes_as_published():
    """More epochs give more, three patterns too; the code of each has the parameters."""
    rows = {row.key.split("/")[1]: row for row in tables()["family_variants"].rows}

    def ap(name):
        return (rows[name] if name in rows else published(f"family/{name}")).metrics["AP"]

    for row in rows.values():
        assert row.source.startswith("README of github.com/")
        assert row.label.endswith(f"{row.epochs} epochs") or row.epochs == 50
        assert (row.extra["params"] is None) == ("smca_multiscale" in row.key)
    short = [name.removesuffix("_12_epochs") for name in rows if name.endswith("_12_epochs")]
    assert len(short) == 6
    for name in short:  # SAM-DETR's 12 epochs lack 3.5 to 6.7 AP of its 50
        full = name.replace("sam", "sam_detr_r50")
        assert 3.5 < ap(full) - ap(f"{name}_12_epochs") < 7
        assert rows[f"{name}_12_epochs"].extra == published(f"family/{full}").extra
    assert ap("smca_detr_r50") < ap("smca_108_epochs") < ap("smca_250_epochs")
    assert ap("dino_r50_4scale") < ap("dino_24_epochs") < ap("dino_36_epochs")
    assert ap("dn_dab_deformable_24_epochs") < ap("dn_dab_deformable_detr_r50")
    assert round(ap("dab_3_patterns") - ap("dab_detr_r50"), 1) == 0.4
    assert round(ap("dab_dc5_3_patterns") - ap("dab_detr_r50_dc5"), 1) == 1.2
    with pytest.raises(UserError, match=r"'family/dab_3_patterns': did you mean '"):
        published("family/dab_3_patterns")


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


def test_a_grid_of_which_nothing_ran_is_not_begun(tmp_path):
    grid = read_grid(write_grid(tmp_path, [cell("base", FULL)], baseline="base"))
    comparison = compare(grid, 10)
    assert not any(row.metrics for row in comparison.rows)
    for text in (terminal(comparison), markdown(comparison), page(comparison)):
        assert "not begun" in text


def test_a_run_without_an_evaluation_yet_is_not_evaluated(tmp_path):
    grid = write_grid(tmp_path, [cell("base", FULL)], baseline="base")
    folder = tmp_path / cell("base", FULL)["folder"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"config": json.loads(recipe("demo").to_json())})
    )
    comparison = compare(read_grid(grid), 10)
    assert "not evaluated" in terminal(comparison)
    assert '<span class="tag not-evaluated">not evaluated</span>' in page(comparison)
    assert "not begun" not in markdown(comparison)
