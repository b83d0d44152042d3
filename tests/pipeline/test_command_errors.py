"""A user's mistake at the command line: one line on stderr, status 2, no traceback."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "dmo"], ["unknown recipe 'dmo'", "'demo'"]),
        (["train", "demo", "--output", "x", "--optimizer.lrr", "1"], ["--optimizer.lr"]),
        (["train", "demo", "--output", "x"], ["--data.train"]),
        (
            ["train", "demo", "--output", "x", "--data.train", "/none", "--data.val", "/none"],
            ["'/none' does not exist", "data_prep convert"],
        ),
        (
            ["train", "demo", "--output", "x", "--data.train", "tests", "--data.val", "tests"],
            ["not a shard folder"],
        ),
        (["evaluate", "--checkpoint", "/none", "--data", "tests"], ["'/none' does not exist"]),
        (["evaluate", "--checkpoint", "tests", "--data", "tests"], ["not a checkpoint"]),
        (["predict", "--checkpoint", "tests"], ["Missing", "--data"]),
        (["trian"], ["unknown command 'trian'", "train"]),
        (["evaluate", "--checkpoint", "tests", "--data", "tests", "--device", "gpu"], ["'gpu'"]),
        (["recipes", "--all"], ["no options"]),
    ],
)
def test_one_clear_line(run_command, arguments, words):
    done = run_command("pipeline", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def test_help_shows_an_example(run_command):
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["recipes"]):
        done = run_command("pipeline", *arguments)
        assert done.returncode == 0
        assert "deformable_detr_r50" in done.stdout or "python -m pipeline" in done.stdout
