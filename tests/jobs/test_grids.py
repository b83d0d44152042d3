"""What grids are: the paper's rows, names, files of one's own, and mistakes in them."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jobs import grid_command
from jobs.__main__ import run_status
from jobs.family_grid import family
from jobs.grid import Cell, Grid, changed, differences, entries, leaves, name_of, runs
from jobs.grid_augmented import sides
from jobs.grid_command import require_same_grid, run_grid, sole
from jobs.grid_file import find_grid
from jobs.grid_options import GridData, GridOptions, common
from jobs.grid_state import write_json
from jobs.papers_grids import PAPERS_GRIDS, figure3, table1, table2, table3
from jobs.published import tables
from jobs.recipe12_grid import recipe12
from model.detr import build_model
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.family_recipes import FAMILY
from pipeline.recipes import deformable_detr_r50, recipe

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "jobs" / "published.json"


def configs(grid: Grid, small: bool = False) -> dict[str, RunConfig]:
    return {cell.name: cell.config(small) for cell in grid.cells}


def test_table_1_has_the_papers_rows_with_their_epochs():
    """Table 1: method, epochs; and section 5 on what DC5+ has of Deformable DETR."""
    rows = configs(table1())
    epochs = {name: config.schedule.epochs for name, config in rows.items()}
    assert epochs == {
        "faster_rcnn": 109, "detr": 500, "detr_dc5": 500, "detr_dc5_50_epochs": 50,
        "detr_dc5_plus": 50, "deformable_detr": 50, "refine": 50, "two_stage": 50,
    }  # fmt: skip
    architectures = [config.model.architecture for config in rows.values()]
    assert architectures == ["faster_rcnn", *["detr"] * 4, *["deformable_detr"] * 3]
    assert [n for n, c in rows.items() if c.model.dilation] == [
        "detr_dc5", "detr_dc5_50_epochs", "detr_dc5_plus",
    ]  # fmt: skip
    assert set(differences(rows["detr_dc5"], rows["detr_dc5_50_epochs"])) == {
        "schedule.epochs", "schedule.drop_epochs",
    }  # fmt: skip
    assert set(differences(rows["detr_dc5_50_epochs"], rows["detr_dc5_plus"])) == {
        "model.classification", "model.num_queries", "model.class_weight", "model.class_cost",
    }  # fmt: skip
    base = rows["deformable_detr"]
    assert differences(base, rows["refine"]) == {"model.box_refine": [False, True]}
    assert set(differences(base, rows["two_stage"])) == {"model.box_refine", "model.two_stage"}
    assert all(c.schedule.drop_epochs == (40,) for c in rows.values() if c.schedule.epochs == 50)


def test_table_2_differs_in_the_tables_columns_and_in_nothing_else():
    """Columns of Table 2: multi-scale inputs, multi-scale attention, K, FPNs."""
    rows = configs(table2())
    columns = {
        name: (c.model.num_levels > 1, c.model.num_levels > 1 and c.model.level_exchange,
               c.model.num_points, c.model.neck)
        for name, c in rows.items()
    }  # fmt: skip
    assert columns == {
        "neck=fpn": (True, True, 4, "fpn"),
        "neck=bifpn": (True, True, 4, "bifpn"),
        "num_levels=1,num_points=1": (False, False, 1, "plain"),
        "level_exchange=false,num_points=1": (True, False, 1, "plain"),
        "level_exchange=false": (True, False, 4, "plain"),
        "baseline": (True, True, 4, "plain"),
    }
    allowed = {"model.num_levels", "model.level_exchange", "model.num_points", "model.neck"}
    for config in rows.values():
        assert set(differences(deformable_detr_r50(), config)) <= allowed
    assert rows["baseline"] == deformable_detr_r50()


def test_table_3_differs_in_the_backbone_alone():
    rows = configs(table3())
    assert [c.model.backbone for c in rows.values()] == [
        "resnet50", "resnet101", "resnext101_64x4d", *["resnext101_64x4d_dcn"] * 2,
    ]  # fmt: skip
    for config in rows.values():
        assert config.model.two_stage
        assert config.model.box_refine
        assert set(differences(rows["resnet50"], config)) <= {"model.backbone"}


def test_figure_3_has_several_drops_and_detr_for_as_long_and_ten_times_as_long():
    rows = configs(figure3())
    assert {n: (c.schedule.epochs, c.schedule.drop_epochs) for n, c in rows.items()} == {
        "deformable_detr": (50, (40,)), "deformable_detr_drop_30": (40, (30,)),
        "deformable_detr_drop_20": (30, (20,)), "detr_dc5_plus": (50, (40,)),
        "detr_dc5_50_epochs": (50, (40,)), "detr_dc5": (500, (400,)),
    }  # fmt: skip


def test_recipe_12_goes_from_two_stage_to_the_recipe_one_switch_at_a_time():
    rows = configs(recipe12())
    whole = recipe("deformable_detr_r50_12ep")
    assert differences(recipe("deformable_detr_r50_two_stage"), rows["two_stage"]) == {
        "model.feedforward_dim": [1024, 2048], "optimizer.batch_size": [32, 16],
        "schedule.epochs": [50, 12], "schedule.drop_epochs": [(40,), (11,)],
    }  # fmt: skip
    names = list(rows)
    steps = [differences(rows[a], rows[b]) for a, b in pairwise(names)]
    assert list(zip(names[1:], steps, strict=True)) == [
        ("no_dropout", {"model.dropout": [0.1, 0.0]}),
        ("mixed_selection", {"model.mixed_query_selection": [False, True]}),
        ("look_forward_twice", {"model.look_forward_twice": [False, True]}),
        ("one_to_many", {"model.one_to_many_queries": [0, 1500]}),
        ("denoising", {"model.denoising_pairs": [0, 100]}),
        ("average", {"optimizer.ema_decay": [0.0, 0.9997]}),
        ("all_but_one_to_many", {"model.one_to_many_queries": [1500, 0]}),
    ]
    assert differences(rows["average"], whole) == {}
    small = configs(recipe12(), small=True)
    assert differences(small["average"], recipe("deformable_detr_r50_12ep_demo")) == {
        "schedule.epochs": [1, 6],
    }  # fmt: skip
    assert small["one_to_many"].model.one_to_many_queries == 150
    assert len(runs(wanted(recipe12(), small=True))) == 7  # none has dropout there


def test_the_family_is_every_method_beside_deformable_detr_at_equal_images():
    rows = configs(family())
    assert set(rows) > {"deformable_detr", "two_stage", "deformable_detr_12ep", "detr_dc5"}
    named = [config.recipe for config in rows.values()]
    assert len(named) == len(set(named))
    assert set(named) >= {function.__name__ for function in FAMILY}
    small = [changed(c, {"schedule.epochs": 12}) for c in configs(family(), small=True).values()]
    seen = {(c.schedule.epochs, c.optimizer.batch_size, c.augment, c.seed) for c in small}
    assert len(seen) == 1


def test_the_page_of_the_family_has_what_is_published():
    page = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([\d.]+) \| ([\d.]*) ?\|$", page, re.M)
    told = [(name, int(e), float(ap), float(m) if m else None) for name, e, ap, m in rows]
    expected = [
        (name, row.epochs, row.metrics["AP"], row.extra["params"])
        for table in ("family", "family_variants")
        for row in tables()[table].rows
        for name in [f"`{row.key.split('/')[1]}`" if table == "family" else row.label]
    ]
    assert told == expected
    assert {f"`{function.__name__}`" for function in FAMILY} <= {name for name, *_ in told}


@pytest.mark.parametrize("name", PAPERS_GRIDS)
def test_at_demo_scale_every_cell_trains_and_stays_what_it_is(name):
    grid = find_grid(name)
    full, small = configs(grid), configs(grid, small=True)
    for cell in full:
        build_model(small[cell].model)
        assert small[cell].model.backbone in ("tiny", "tiny_dcn")
        assert small[cell].schedule.epochs == max(1, round(full[cell].schedule.epochs * 6 / 50))
        for kept in ("architecture", "num_levels", "num_points", "neck", "level_exchange",
                     "two_stage", "dilation", "classification"):  # fmt: skip
            assert getattr(small[cell].model, kept) == getattr(full[cell].model, kept), kept


@pytest.mark.parametrize("name", PAPERS_GRIDS)
def test_every_published_key_is_a_row_of_ours(name):
    tables = json.loads(PUBLISHED.read_text())["tables"]
    known = {f"{table}/{row[0]}" for table, rows in tables.items() for row in rows["rows"]}
    keys = [cell.published for cell in find_grid(name).cells if cell.published]
    assert set(keys) <= known
    assert len(keys) == len(set(keys)) >= (3 if name in ("figure3", "recipe12") else 4)
    if name in ("table1", "table2"):  # Table 3 has other detectors, too
        assert len(keys) == len(tables[name]["rows"])


def wanted(grid: Grid, small: bool = False, seeds: int = 1):
    return entries(grid, small, seeds, lambda config: config)


def test_cells_of_one_config_share_a_run_and_seeds_do_not():
    found = wanted(table3(), small=True, seeds=2)
    assert [(e.cell, e.seed, e.folder) for e in found[:4]] == [
        ("resnet50", 42, "runs/resnet50-seed42"), ("resnet101", 42, "runs/resnet50-seed42"),
        ("resnext101", 42, "runs/resnet50-seed42"),
        ("resnext101_dcn", 42, "runs/resnext101_dcn-seed42"),
    ]  # fmt: skip
    of_seed = ("resnet50", "resnext101_dcn", "resnext101_dcn_tta")
    assert [e.run for e in runs(found)] == [f"{name}-seed{s}" for s in (42, 43) for name in of_seed]
    assert [e.config.seed for e in runs(found)] == [42] * 3 + [43] * 3
    assert len(runs(wanted(table3()))) == 5
    # What does not decide the result can still be what a grid is about.
    stages = [Cell(f"z{z}", "demo", {"engine.zero_stage": z}) for z in (0, 1)]
    assert len(runs(wanted(Grid("zero", tuple(stages))))) == 2


@pytest.mark.parametrize("small", [False, True])
def test_an_augmented_cell_evaluates_the_run_that_is_trained_with_its_config(small):
    *found, last = wanted(table3(), small)
    assert (last.cell, last.folder) == ("resnext101_dcn_tta", "runs/resnext101_dcn_tta-seed42")
    assert last.evaluates == found[-1].folder == "runs/resnext101_dcn-seed42"
    assert last.config == found[-1].config
    assert last.differences == {**found[-1].differences, "tta": [False, True]}
    assert not any(entry.evaluates for entry in found)
    first = [Cell("b", "demo", tta=True), Cell("a", "demo", {"model.num_points": 4})]  # as it is
    assert wanted(Grid("any", tuple(first)))[0].evaluates == "runs/a-seed42"
    with pytest.raises(UserError, match="grid any, cell b: tta: got no cell that is trained"):
        wanted(Grid("any", (first[0], Cell("a", "demo", {"model.num_points": 2}))))


def test_augmented_views_are_shares_of_the_evaluations_size():
    assert sides(recipe("deformable_detr_r50")) == (600, 800, 1000)
    assert sides(recipe("demo")) == ()  # images as large as they are: mirrored alone


def test_differences_are_those_from_the_baseline():
    found = {e.cell: e.differences for e in wanted(table2())}
    assert found["baseline"] == {}
    assert found["num_levels=1,num_points=1"] == {
        "model.num_levels": [4, 1], "model.num_points": [4, 1],
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_names_have_short_fields_and_safe_values():
    base = recipe("demo")
    changes = {
        "optimizer.lr": "1e-4", "model.two_stage": False, "model.box_refine": True,
        "schedule.drop_epochs": [3, 5], "data.train": "/shared/a b", "model.num_points": 4,
    }  # fmt: skip
    assert name_of(base, changed(base, changes), changes) == (
        "lr=0.0001,two_stage=false,drop_epochs=3+5,train=shared-a-b"
    )
    assert name_of(base, base, changes) == "baseline"


def test_every_field_can_be_changed_to_what_it_is():
    config = recipe("deformable_detr_r50")
    fields = {k: v for k, v in leaves(config).items() if k not in ("recipe", "seed")}
    assert changed(config, fields) == config
    assert changed(config, {"schedule.drop_epochs": "11 15"}).schedule.drop_epochs == (11, 15)
    assert changed(config, {"schedule.drop_epochs": []}).schedule.drop_epochs == ()
    assert changed(config, {"model.level_exchange": "false"}).model.level_exchange is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_pints": 1}, "got 'model.num_pints': did you mean 'model.num_points'?"),
        ({"model.num_points": 1.5}, "model.num_points: invalid literal for int"),
        ({"model.num_points": True}, "model.num_points: got True, expected a value like 4"),
        ({"model.num_points": [1, 2]}, "2"),
        ({"model.num_points": None}, "model.num_points: got None, expected one value or a list"),
        ({"model.num_points": {"a": 1}}, "expected one value or a list"),
        ({"model.box_refine": "yes"}, "model.box_refine: got 'yes', expected true or false"),
        ({"model.neck": "fnp"}, "Expected one of ('plain', 'fpn', 'bifpn')"),
        ({"model.num_levels": 2}, "num_levels: got 2, expected 1, or 3 and up"),
        ({"model.neck": "fpn", "model.num_levels": 1}, "one level has none to be joined with"),
        ({"optimizer.batch_size": 0}, "optimizer.batch_size: got 0, expected 1 or more"),
        ({"model": "x"}, "got 'model': "),
        ({"": 1}, "got '': expected a field of RunConfig"),
        ({"seed": 3}, "seed is no field that a cell changes: use --seeds N"),
        ({"recipe": "demo"}, "make it the cell's base"),
        ({"help": ""}, "got 'help'"),
    ],
)
def test_a_mistaken_change_is_one_clear_line(changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        changed(deformable_detr_r50(), changes)
    assert "\n" not in str(raised.value)
    assert "--" not in str(raised.value).replace("--seeds", "").replace("--help", "")


YAML = """
name: mine
baseline: demo
set: {schedule.epochs: 12, optimizer.lr: 1e-3}
axes:
  model.num_points: [1, 4]
  model.level_exchange: [true, false]
cells:
  wide: {model.hidden_dim: 96}
  plain_detr: {recipe: detr_r50_dc5_demo}
  wide_tta: {model.hidden_dim: 96, tta: true}
"""


def test_a_yaml_file_is_a_baseline_with_axes_and_cells(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(YAML)
    grid = find_grid(str(path))
    found = configs(grid)
    assert (grid.name, grid.baseline) == ("mine", "baseline")
    assert list(found) == [
        "num_points=1", "num_points=1,level_exchange=false", "baseline", "level_exchange=false",
        "wide", "plain_detr", "wide_tta",
    ]  # fmt: skip
    assert [cell.name for cell in grid.cells if cell.tta] == ["wide_tta"]
    assert wanted(grid)[-1].evaluates == "runs/wide-seed42"
    assert {c.schedule.epochs for c in found.values()} == {12}
    assert {c.optimizer.lr for c in found.values()} == {1e-3}
    cell = found["num_points=1,level_exchange=false"].model
    assert (cell.num_points, cell.level_exchange) == (1, False)
    assert found["plain_detr"].model.architecture == "detr"
    assert found["wide"].model.hidden_dim == 96


def test_a_baseline_that_no_combination_has_is_a_cell_too(tmp_path):
    path = tmp_path / "points.yml"
    path.write_text("baseline: demo\naxes: {model.num_points: [1, 2]}\n")
    grid = find_grid(str(path))
    assert grid.name == "points"
    assert list(configs(grid)) == ["baseline", "num_points=1", "num_points=2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got NoneType, expected the keys name, baseline, set, axes, cells"),
        ("- a\n", "got list"),
        ("a: [1", "line 1: "),
        ("\x00", "not YAML"),
        ("axes: {}\n", "baseline: got None, expected a recipe"),
        ("baseline: deformable_detr_r5\naxes: {a: [1]}", "did you mean 'deformable_detr_r50'?"),
        ("baseline: demo\naxis: {}", "got 'axis': did you mean 'axes'?"),
        ("baseline: demo", "got neither axes nor cells"),
        ("baseline: demo\naxes: [model.num_points]", "axes: got ['model.num_points']"),
        ("baseline: demo\naxes: {model.num_pints: [1]}", "did you mean 'model.num_points'?"),
        ("baseline: demo\naxes: {model.num_points: 4}", "got 4, expected a list of values"),
        ("baseline: demo\naxes: {model.num_points: []}", "got [], expected a list of values"),
        ("baseline: demo\naxes: {model.num_points: [x]}", "model.num_points: invalid literal"),
        ("baseline: demo\naxes: {model.num_points: [2, 2]}", "got 2 cells with the name"),
        ("baseline: demo\naxes: {model.num_points: [4, 4]}", "got 2 cells with the name"),
        ("baseline: demo\naxes:\n  seed: [1, 2]", "use --seeds N"),
        ("baseline: demo\naxes:\n  optimizer.lr: [1]\n  optimizer.lr: [2]", "line 4: got"),
        ("baseline: demo\nset: {model.nek: fpn}\naxes: {}", "set: got 'model.nek': did you mean"),
        ("baseline: demo\ncells: {a: 3}", "cells: a: got 3, expected fields"),
        ("baseline: demo\ncells: {a: {recipe: dmeo}}", "cells: a: unknown recipe 'dmeo'"),
        ("baseline: demo\ncells: {a: {recipe: 3}}", "cells: a: recipe: got 3"),
        ("baseline: demo\ncells: {a: {tta: yes please}}", "cells: a: tta: got 'yes please'"),
        ("baseline: demo\ncells: {a/b: {model.num_points: 1}}", "got the name 'a/b'"),
        ("baseline: demo\ncells: {baseline: {model.num_points: 1}}", "2 cells with the name"),
        ("baseline: demo\nname: ../x\ncells: {a: {}}", "got the name '../x'"),
        (
            "baseline: demo\naxes: {optimizer.lr: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],"
            " optimizer.weight_decay: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],"
            " optimizer.clip_norm: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}",
            "got 1100 combinations, expected at most 1000",
        ),
    ],
)
def test_a_mistake_in_a_yaml_file_is_one_clear_line(text, message, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        find_grid(str(path))
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_python_file_gives_a_grid(tmp_path):
    path = tmp_path / "widths.py"
    path.write_text(
        "from jobs.grid import Cell, Grid\n"
        "def grid():\n"
        "    cells = [Cell(f'w{w}', 'demo', {'model.hidden_dim': w}) for w in (64, 96)]\n"
        "    return Grid('widths', tuple(cells), baseline='w64')\n"
    )
    assert [c.model.hidden_dim for c in configs(find_grid(str(path))).values()] == [64, 96]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def grid(:", "SyntaxError"),
        ("x = 1\nraise KeyError('no')", "line 2: KeyError"),
        ("def gird(): pass", "got no function grid()"),
        ("def grid(): return [1]", "grid() returned list, expected a jobs.grid.Grid"),
        ("def grid():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("from jobs.grid import Grid\ndef grid(): return Grid('a', ())", "got no cells"),
        (
            "from jobs.grid import Cell, Grid\ndef grid():\n"
            "    return Grid('a', (Cell('b', 'demo'),), baseline='c')",
            "got the baseline 'c', expected one of its cells: b",
        ),
    ],
)
def test_a_mistake_in_a_python_file_is_one_clear_line(text, message, tmp_path):
    path = tmp_path / "grid.py"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        find_grid(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a grid first, table1"),
        (("--scale", "demo"), "expected a grid first"),
        (("tabel2",), "did you mean 'table2'?"),
        (("none.yaml",), "or a file that exists"),
        (("table2",), "expected --data.train DIR --data.val DIR"),
        (("table2", "--data.train", "a"), "got one of --data.train and --data.val"),
        (("table2", "--data.labels", "contiguous"), "unknown option --data.labels"),
        (("table2", "--seeds", "0", "--dry-run"), "seeds: got 0, expected 1 or more"),
        (("table2", "--only", "fpn", "--dry-run"), "only: got 'fpn', expected cells of it: neck="),
        (("table2", "--dry-run", "--plan"), "expected one of them"),
        (("table2", "--dry-run", "--set", "model.nek", "fpn"), "did you mean 'model.neck'?"),
        (("table2", "--dry-run", "--workers", "64"), "got 32 images for 64 processes"),
        (("table2", "--dry-run", "--backbones", "/none"), "/none/resnet50.pth does not exist"),
        (("table2", "--dry-run", "--tracking-uri", "https://me:pa55@m"), "a user or password"),
        (("table2", "--data.train", "/no", "--data.val", "/no"), "'/no' does not exist"),
    ],
)
def test_a_mistake_on_the_command_line_starts_nothing(arguments, message, tmp_path):
    given = [*arguments, "--output", str(tmp_path / "out")] if arguments else []
    if arguments and not arguments[0].startswith("-"):
        given = [arguments[0], "--output", str(tmp_path / "out"), *arguments[1:]]
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        run_grid(given)
    assert "\n" not in str(raised.value)
    assert "pa55" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_grid_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        run_grid(["table2", "--dry-run", "--output", str(tmp_path)])
    (tmp_path / "grid.json").write_text(json.dumps({"name": "table1", "cells": []}))
    with pytest.raises(UserError, match="has the grid 'table1', expected 'table2'"):
        run_grid(["table2", "--dry-run", "--output", str(tmp_path)])


def test_a_grid_that_is_only_being_begun_is_not_something_else(tmp_path):
    """Or was killed before it had a grid.json: the same command goes on."""
    (tmp_path / "grid.json.7-0.tmp").write_text("{")
    with sole(tmp_path):
        require_same_grid(tmp_path, "table2")
        with pytest.raises(UserError, match="is being run by another command"):
            sole(tmp_path)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        require_same_grid(tmp_path, "table2")


def test_a_folder_that_another_grid_took_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "grid"

    def another_ends(*_):
        write_json(folder / "grid.json", {"name": "table1", "cells": []})

    monkeypatch.setattr(grid_command, "require_data", another_ends)
    monkeypatch.setattr(grid_command, "write_grid", lambda *_: pytest.fail("overwritten"))
    with pytest.raises(UserError, match="has the grid 'table1', expected 'table2'"):
        run_grid(["table2", "--data.train", "a", "--data.val", "b", "--output", str(folder)])


def test_every_cell_gets_the_data_and_its_backbones_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for name in ("resnet50", "resnet101", "resnext101_64x4d"):
        (tmp_path / "weights" / f"{name}.pth").touch()
    given = GridOptions(
        data=GridData("shards/train", "s3://bucket/val"),
        backbones=Path("weights"),
        set=(("schedule.epochs", "12"), ("data.labels", "contiguous")),
    )
    found = entries(table3(), False, 1, common(given))
    assert {e.config.data.train for e in found} == {str(tmp_path / "shards/train")}
    assert {e.config.data.val for e in found} == {"s3://bucket/val"}
    assert {(e.config.schedule.epochs, e.config.data.labels) for e in found} == {(12, "contiguous")}
    assert [Path(e.config.init.backbone).name for e in found] == [
        "resnet50.pth", "resnet101.pth", *["resnext101_64x4d.pth"] * 3,
    ]  # fmt: skip
    own = Grid("own", (Cell("a", "demo", {"data.train": "/mine"}),))
    (entry,) = entries(own, False, 1, common(given))
    assert (entry.config.data.train, entry.config.data.val) == ("/mine", "s3://bucket/val")
    small = replace(given, scale="demo", data=GridData(), set=())
    (entry, *_) = entries(table3(), True, 1, common(small))
    assert entry.config.init.backbone == ""
    assert entry.config.data.train == str(tmp_path / "outputs/demo/shards-3000-200/train")


def test_a_dry_run_names_each_cell_with_its_differences_and_writes_nothing(tmp_path, capsys):
    with pytest.raises(UserError, match=r"expected --data\.train DIR --data\.val DIR"):
        run_grid(["table2", "--dry-run", "--seeds", "2", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("table2: 12 cells, 12 runs in ")
    assert any(re.match(r"neck=fpn +42 +50 +train +model.neck plain -> fpn$", x) for x in said)
    assert any(re.match(r"baseline +43 +50 +train +-$", x) for x in said)
    assert said[-1].startswith("12 runs start from random weights; --backbones DIR gives them")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_evaluated_again(tmp_path, capsys):
    given = ["--scale", "demo", "--dry-run", "--output", str(tmp_path / "out")]
    run_grid(["table3", *given])
    *_, last, remark = capsys.readouterr().out.splitlines()
    said = [part.strip() for part in last.split("  ") if part]
    assert said[0] == "resnext101_dcn_tta"
    assert said[2:4] == ["-", "evaluate resnext101_dcn-seed42 with test-time augmentation"]
    assert said[4].endswith("tta False -> True")
    assert remark.startswith("at demo scale 6 epochs stand for 50")


def test_a_dry_run_shows_what_demo_scale_makes_of_epochs(tmp_path, capsys):
    path = tmp_path / "short.yaml"
    path.write_text(
        "baseline: deformable_detr_r50\nset: {schedule.epochs: 2}\n"
        "cells: {long: {schedule.epochs: 100}}\n"
    )
    given = [str(path), "--scale", "demo", "--dry-run", "--output", str(tmp_path / "out")]
    run_grid(given)
    said = capsys.readouterr().out
    assert dict(re.findall(r"^(\w+) +42 +(\d+) +train ", said, re.M)) == {
        "baseline": "1", "long": "12",
    }  # fmt: skip
    assert "at demo scale 6 epochs stand for 50, others in proportion" in said
    run_grid([*given, "--set", "schedule.epochs", "2"])
    said = capsys.readouterr().out
    assert re.findall(r"^\w+ +42 +(\d+) ", said, re.M) == ["2", "2"]
    assert "epochs stand for" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data: expected --data.train DIR --data.val DIR, or --scale demo"),
        (["--data.train", "/no", "--data.val", "/no"], "shard folder '/no' does not exist"),
    ],
)
def test_a_dry_run_ends_with_what_a_real_start_would_refuse(arguments, message, tmp_path, capsys):
    given = ["table2", "--output", str(tmp_path / "out"), *arguments]
    refused = []
    for more in (["--dry-run"], []):
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            run_grid([*given, *more])
        refused.append(str(raised.value))
        assert ("would" in capsys.readouterr().out) == bool(more)
    assert refused[0] == refused[1]
    assert not (tmp_path / "out").exists()
    # With an address only the cluster's nodes may see the data.
    if arguments:
        run_grid([*given, "--dry-run", "--address", "http://nowhere:8265"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --address http://HOST:8265 or --grid FOLDER"),
        (["--grid", "x", "--address", "http://x"], "expected either --address"),
        (["--grid", "/none"], "/none is no grid's folder: it has no grid.json"),
    ],
)
def test_status_of_nothing_is_one_clear_line(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_status(arguments)
