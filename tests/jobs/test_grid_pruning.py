"""Hopeless cells: the band by hand, its properties, and what a grid's command does about them."""

import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import grid_run, grid_status
from jobs.compare import compare
from jobs.grid_command import run_grid, write_grid
from jobs.grid_dry_run import action, looked
from jobs.grid_options import GridOptions
from jobs.grid_pruning import Band, Left, Pruning, left_band, pruning
from jobs.grid_state import DONE, FAILED, PRUNED, RESUME, Record
from jobs.grid_status import status
from jobs.measured import read_grid
from pipeline.errors import UserError
from tests.jobs.made_up_grids import grid_of, outcomes, pretend, scripted

BAND = Band(absolute=0.05, relative=0.5, after=0.5, evaluations=2)


def curve(*aps: float) -> dict[float, float]:
    return {float(epoch): ap for epoch, ap in enumerate(aps, 1)}


# The band


def test_a_curve_leaves_the_band_by_its_last_evaluations():
    reference = [curve(0.1, 0.2, 0.3, 0.4)]  # and the band is 0.05, 0.1, 0.15, 0.2 below
    below = curve(0.0, 0.0, 0.1, 0.1)
    assert left_band(below, 4, reference, BAND) == Left(4.0, 0.1, 0.4, 0.2)
    assert left_band({**below, 4.0: 0.2}, 4, reference, BAND) is None  # on its edge: within
    assert left_band({**below, 3.0: 0.15}, 4, reference, BAND) is None  # not twice in a row
    assert left_band(curve(0.0, 0.0, 0.1), 4, reference, BAND) is not None
    assert left_band(curve(0.0, 0.0), 4, reference, BAND) is None  # the first in the first half
    assert left_band(curve(0.0, 0.0, 0.1), 8, reference, BAND) is None  # of a longer schedule
    assert left_band(curve(0.0), 1, reference, BAND) is None  # one evaluation is not two
    assert left_band({}, 4, reference, BAND) is None


def test_without_a_reference_at_the_same_epochs_nothing_is_flagged():
    below = curve(0.0, 0.0, 0.0, 0.0)
    assert left_band(below, 4, [], BAND) is None
    assert left_band(below, 4, [curve(0.2, 0.3, 0.4)], BAND) is None
    assert left_band(below, 4, [{3.0: 0.4, 4.5: 0.4}], BAND) is None
    assert left_band(below, 4, [curve(0.2, 0.3, 0.4), {4.0: 0.4}], BAND) is not None


def test_near_zero_the_absolute_margin_counts_and_the_lowest_seed():
    slow = curve(0.0, 0.0, 0.0, 0.0)
    assert left_band(slow, 4, [curve(0.01, 0.02, 0.04, 0.05)], BAND) is None
    high, low = curve(0.2, 0.3, 0.4, 0.5), curve(0.2, 0.2, 0.05, 0.05)
    assert left_band(slow, 4, [high], BAND) is not None
    assert left_band(slow, 4, [high, low], BAND) is None


def test_measured_curves_of_the_demo_show_what_the_band_gets_wrong():
    """docs/models.md, AP at demo scale. In the paper's Table 2 a single scale is 4.1 AP behind, far
    from hopeless; here it would be pruned, as docs/grids.md says."""
    base = [curve(0.010, 0.032, 0.058, 0.087, 0.113, 0.129)]
    single_scale = [0.006, 0.015, 0.025, 0.036, 0.039, 0.041]
    dc5 = [0.013, 0.014, 0.042, 0.064, 0.091, 0.104]
    flagged = [n for n in range(1, 7) if left_band(curve(*single_scale[:n]), 6, base, Band())]
    assert flagged == [5, 6]
    assert not [n for n in range(1, 7) if left_band(curve(*dc5[:n]), 6, base, Band())]


APS = st.floats(0, 1)
BANDS = st.builds(Band, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 4))
CURVES = st.dictionaries(st.integers(1, 8).map(float), APS)


@given(st.lists(st.tuples(APS, APS), min_size=1, max_size=8), st.lists(CURVES), BANDS)
def test_a_curve_above_one_that_is_within_is_within(pairs, references, band):
    lower, upper = (curve(*map(choose, pairs)) for choose in (min, max))
    if left_band(upper, 8, references, band):
        assert left_band(lower, 8, references, band)


@given(CURVES, st.lists(CURVES), BANDS)
def test_a_reference_never_leaves_its_own_band(own, others, band):
    assert left_band(own, 8, [own, *others], band) is None


@given(st.lists(APS, min_size=8, max_size=8), st.lists(CURVES, min_size=1), CURVES, BANDS)
def test_a_further_seed_where_there_is_one_only_widens_the_band(aps, references, further, band):
    there = {epoch for reference in references for epoch in reference}
    further = {epoch: ap for epoch, ap in further.items() if epoch in there}
    if left_band(curve(*aps), 8, [*references, further], band):
        assert left_band(curve(*aps), 8, references, band)


# A grid's runs


def test_a_flag_tells_epoch_ap_and_band(tmp_path):
    base, slow, other = grid_of("base", "slow", "other")
    pretend(tmp_path / base.folder, base.config, 3, aps=[0.1, 0.2, 0.4])
    for entry in (slow, other):
        pretend(tmp_path / entry.folder, entry.config, 3, aps=[0.0, 0.05, 0.1])
    path = tmp_path / other.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val_digest": "v1"}))
    found = Pruning(tmp_path, (tmp_path / base.folder,), "base", BAND, False)
    said = "AP 0.100 at epoch 3 is below 0.200, the band of base (AP 0.400 there)"
    assert found.flag(slow) == said
    assert found.flag(base) == ""
    assert found.flag(other) == ""  # evaluated on other data
    longer = replace(slow.config, schedule=replace(slow.config.schedule, epochs=6))
    pretend(tmp_path / slow.folder, longer, 4, aps=[0.0, 0.05, 0.1, 0.1])
    assert found.flag(slow) == ""  # the reference is not there yet
    pretend(tmp_path / base.folder, base.config, 4, aps=[0.1, 0.2, 0.4, 0.4])
    assert found.flag(slow) == (
        "AP 0.100 at epoch 4 is below 0.200, the band of base (AP 0.400 there), compared by epoch: "
        "6 are planned, 4 of base"
    )
    pretend(tmp_path / slow.folder, slow.config, 4, aps=[0.0, 0.05, 0.1, 0.1])
    assert found.flag(slow) == ""  # nothing is left to be saved


def test_references_of_ones_own_are_evaluated_runs(tmp_path):
    base, slow = grid_of("base", "slow")
    given_ = tmp_path / "elsewhere"
    with pytest.raises(UserError, match="elsewhere has no evaluated run, expected a run folder"):
        pruning(tmp_path, [base, slow], "base", (given_,), BAND, False)
    pretend(given_, base.config, 4, aps=[0.1, 0.2, 0.4, 0.4])
    pretend(tmp_path / slow.folder, slow.config, 3, aps=[0.0, 0.0, 0.1])
    found = pruning(tmp_path, [base, slow], "base", (given_,), BAND, False)
    assert "the band of elsewhere (AP 0.400 there)" in found.flag(slow)
    own = pruning(tmp_path, [base, slow], "base", (), BAND, False)
    assert (own.references, own.name) == ((tmp_path / base.folder,), "base")


GOOD = [0.1, 0.2, 0.3, 0.4]
BAD = [0.0, 0.05, 0.1, 0.1]  # has left BAND in its third epoch


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """`trained(*moments, prune=…)`: runs the cell "slow" of a grid whose baseline is done. Between
    two looks at the cluster the moments are called in turn: functions of the client, or numbers of
    epochs after which "slow" is from then on. Returns entries, client and what was said."""

    def run(*moments, prune=False):
        make = scripted(tmp_path, monkeypatch)
        found, client, runner, said = make("base", "slow", band=BAND, prune=prune, slow=[])
        write_grid(tmp_path, "made", "base", found, ["made"])
        pretend(tmp_path / found[0].folder, found[0].config, 4, aps=GOOD)
        left = list(moments)

        def sleep(_):
            moment = left.pop(0)
            if isinstance(moment, int):
                pretend(tmp_path / found[1].folder, found[1].config, moment, aps=BAD)
            else:
                moment(client)

        clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
        monkeypatch.setattr(grid_run, "time", clock)
        runner.run(found[1:])
        assert left == []
        return found, client, said

    return run


FLAG = "AP 0.100 at epoch 3 is below 0.150, the band of base (AP 0.300 there)"


def test_a_hopeless_cell_is_flagged_and_trains_on(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid_status, "QUIET", math.inf)  # made-up runs are of long ago

    def note(client):
        assert Record.read(tmp_path, "slow-seed42").flag == FLAG
        status(tmp_path, watch=False)
        seen.extend(compare(read_grid(tmp_path), 0).notes)

    seen: list[str] = []
    found, _, said = trained(2, 3, note, lambda client: client.finish("slow"))
    assert outcomes(tmp_path, found)["slow"] == (DONE, 1)
    assert Record.read(tmp_path, "slow-seed42").flag == ""
    assert [line for line in said if "flag" in line] == [f"slow-seed42: flagged: {FLAG}"]
    assert re.search(rf"slow .*flagged: {re.escape(FLAG[:60])}", capsys.readouterr().out)
    assert f"slow: not finished: epoch 3 of 4, flagged: {FLAG} (seed 42)" in seen


def test_with_prune_it_is_saved_and_stopped_and_not_tried_again(trained, tmp_path, capsys):
    found, client, said = trained(2, 3, lambda client: None, prune=True)
    assert outcomes(tmp_path, found)["slow"] == (PRUNED, 1)
    assert said[-3:] == [
        f"slow-seed42: flagged: {FLAG}", "slow-seed42: saving, to be pruned",
        f"slow-seed42: pruned: {FLAG}",
    ]  # fmt: skip
    assert client.order == ["slow"]
    status(tmp_path, watch=False)
    shown = capsys.readouterr().out
    assert re.search(rf"slow +42 +pruned +3.0/4 +0.100 +- +1 +{re.escape(FLAG)}", shown)
    assert "1 done, 1 pruned" in shown
    assert any(f"pruned: {FLAG}" in note for note in compare(read_grid(tmp_path), 0).notes)


def test_what_is_pruned_is_left_by_prune_alone_and_while_the_flag_holds(trained, tmp_path):
    found, *_ = trained(3, lambda client: None, prune=True)
    base, slow = found

    def how(prune):
        held = pruning(tmp_path, found, "base", (), BAND, prune)
        one = looked(tmp_path, found, GridOptions(prune=prune), held)[slow.run]
        return one.state, action(one, slow)

    assert how(True) == (PRUNED, f"do nothing: pruned ({FLAG})")
    state, said = how(False)
    assert state == RESUME
    assert said == f"go on after epoch 3.0 of 4 (pruned before: {FLAG})"
    pretend(tmp_path / base.folder, base.config, 4, aps=[0.1, 0.1, 0.15, 0.2])
    for prune in (True, False):
        state, said = how(prune)
        assert state == RESUME
        assert "pruned before, and within the band now" in said


def test_a_run_that_is_hopeless_already_is_not_submitted(tmp_path, monkeypatch):
    make = scripted(tmp_path, monkeypatch)
    found, client, runner, said = make("base", "slow", band=BAND, prune=True)
    pretend(tmp_path / found[0].folder, found[0].config, 4, aps=GOOD)
    pretend(tmp_path / found[1].folder, found[1].config, 3, aps=BAD)
    Record(2, FAILED, "it broke").write(tmp_path, found[1].run)
    runner.run(found[1:])
    assert client.order == []
    assert outcomes(tmp_path, found)["slow"] == (PRUNED, 2)
    assert said[-1] == f"slow-seed42: pruned: {FLAG}"


def test_a_stop_that_did_not_reach_the_cluster_is_asked_for_again(trained, tmp_path):
    def away(client):
        stop = client.stop_job

        def refused(job):
            client.stop_job = stop
            raise ConnectionError("refused")

        client.stop_job = refused

    found, _, said = trained(2, away, 3, lambda client: None, lambda client: None, prune=True)
    assert outcomes(tmp_path, found)["slow"] == (PRUNED, 1)
    assert any("does not answer (refused)" in line for line in said)


# The command

TWO = """
from jobs.grid import Cell, Grid

def grid():
    common = {"schedule.epochs": 4, "data.train": "/none", "data.val": "/none"}
    names = ("base", "slow")
    cells = [Cell(n, "demo", common | {"model.num_points": i}) for i, n in enumerate(names, 1)]
    return Grid("two", tuple(cells), baseline="base")
"""


def test_the_command_ends_with_what_is_pruned_and_starts_no_cluster_for_it(
    trained, tmp_path, capsys
):
    path = tmp_path / "two.py"
    path.write_text(TWO)
    out = tmp_path / "out"
    shared = ["--output", str(out), "--band.evaluations", "2"]
    (tmp_path / "runs").mkdir()
    found, *_ = trained(3, lambda client: None, prune=True)
    for name in ("runs", "records", "grid.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(out / name)
    (out / "grid.json").write_text(json.dumps({"name": "two", "cells": []}))
    for entry in found:  # as the file has them
        config = replace(entry.config, data=replace(entry.config.data, train="/none", val="/none"))
        epochs, aps = (4, GOOD) if entry.cell == "base" else (3, BAD)
        pretend(out / entry.folder, config, epochs, aps=aps)
    run_grid([str(path), *shared, "--prune", "--dry-run"])
    assert f"slow  42    4       do nothing: pruned ({FLAG}" in capsys.readouterr().out
    with pytest.raises(UserError) as told:
        run_grid([str(path), *shared, "--prune"])
    assert str(told.value).startswith("1 of 2 cells are not done: slow (pruned); ")
    assert str(told.value).endswith("runs what is left, pruned ones without --prune")
    run_grid([str(path), *shared, "--dry-run"])
    assert f"go on after epoch 3.0 of 4 (pruned before: {FLAG}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--band.relative", "1.5"), "band.relative: got 1.5, expected 0 to 1"),
        (("--band.after", "-0.1"), "band.after: got -0.1, expected 0 to 1"),
        (("--band.evaluations", "0"), "band.evaluations: got 0, expected 1 or more"),
        (("--reference", "/none"), "reference: /none has no evaluated run"),
    ],
)
def test_a_mistake_about_the_band_is_one_clear_line(arguments, message, tmp_path):
    given_ = ["table2", "--dry-run", "--output", str(tmp_path / "out"), *arguments]
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        run_grid(given_)
    assert "\n" not in str(raised.value)
