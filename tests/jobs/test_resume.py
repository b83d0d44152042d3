"""`jobs resume`: what was begun is found again, and what is given anew counts."""

import json

import pytest

from jobs import resume
from jobs.resume import run_resume, without
from jobs.spec import JobSpec
from pipeline.errors import UserError
from pipeline.recipes import recipe


def test_options_are_taken_out_with_their_values():
    given = ["table2", "--address", "http://a", "--workers=3", "--scale", "demo", "--workers-not"]
    kept = without(without(given, "--address"), "--workers")
    assert kept == ["table2", "--scale", "demo", "--workers-not"]
    assert without([], "--address") == []


def test_a_grid_is_run_by_its_own_command_from_its_own_folder(tmp_path, run_command):
    grid, elsewhere = tmp_path / "grid", tmp_path / "elsewhere"
    grid.mkdir()
    elsewhere.mkdir()
    arguments = ["table2", "--scale", "demo", "--dry-run", "--only", "baseline", "--workers", "2"]
    about = {"arguments": arguments, "directory": str(elsewhere)}
    content = {"name": "table2_demo", "baseline": "baseline", "cells": [], "command": about}
    (grid / "grid.json").write_text(json.dumps(content))
    done = run_command("jobs", "resume", grid, "--workers", 3)
    assert done.returncode == 0, done.stderr
    # The grid's name and folder, and the cell, come from the command that was kept.
    assert done.stdout.splitlines()[0].startswith("table2_demo: ")
    assert str(grid) in done.stdout
    assert "--workers" not in done.stderr


def test_what_is_given_anew_replaces_what_was_kept(tmp_path, monkeypatch):
    about = {"arguments": ["g.yaml", "--address", "http://old"], "directory": str(tmp_path)}
    (tmp_path / "grid.json").write_text(json.dumps({"name": "g", "cells": [], "command": about}))
    ran = []
    monkeypatch.setattr(resume, "run_grid", ran.append)
    monkeypatch.chdir(tmp_path)
    run_resume([str(tmp_path), "--address", "http://new"])
    assert ran == [["g.yaml", "--address", "http://new", "--output", str(tmp_path)]]


def test_a_run_is_submitted_as_it_was(tmp_path, monkeypatch):
    spec = JobSpec(
        config=recipe("demo").to_json(), folder="/where/it/was", workers=4, min_workers=3,
        tracking_uri="http://mlflow", experiment="mine",
    )  # fmt: skip
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "job.json").write_text(spec.to_json())
    launched = []
    monkeypatch.setattr(resume, "launch", lambda *given: launched.append(given))
    run_resume([str(tmp_path), "--workers", "2", "--address", "http://new", "--no-wait"])
    [(again, address, wait)] = launched
    assert (address, wait) == ("http://new", False)
    assert (again.workers, again.min_workers) == (2, 2)
    assert again.folder == str(tmp_path)  # storage may be mounted elsewhere now
    assert again.run_config() == recipe("demo")
    assert (again.tracking_uri, again.experiment) == ("http://mlflow", "mine")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "neither ray/job.json nor grid.json"),
        ({"ray/job.json": "{"}, "not of this version"),
        ({"ray/job.json": '{"future": 1}'}, "not of this version"),
        ({"grid.json": '{"name": "g", "cells": []}'}, "does not say how it was begun"),
        (
            {"grid.json": '{"command": {"arguments": [], "directory": "/nowhere/at/all"}}'},
            "was begun in /nowhere/at/all, which is not here",
        ),
    ],
)
def test_what_cannot_be_resumed_is_said_in_a_line(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as failure:
        run_resume([str(tmp_path)])
    assert "\n" not in str(failure.value)
