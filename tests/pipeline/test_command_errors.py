"""A user's mistake at the command line: one line on stderr, status 2, no traceback."""

import signal
from dataclasses import replace

import pytest

from pipeline.__main__ import COMMANDS
from pipeline.cli import main


def check_one_line(stdout: str, stderr: str, words: list[str]) -> None:
    assert stdout == ""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "dmo"], ["unknown recipe 'dmo'", "'demo'"]),
        (["train", "demo", "--output", "x", "--optimizer.lrr", "1"], ["--optimizer.lr"]),
        (["train", "demo", "--output", "x", "--lr", "1"], ["did you mean --optimizer.lr?"]),
        (["train", "demo", "--output", "x", "--model.two-stage", "True"], ["takes no value"]),
        (["train", "dino"], ["did you mean 'dino_r50_4scale'"]),
        (["train", "demo", "--output", "x"], ["--data.train"]),
        (
            ["train", "demo", "--output", "x", "--data.train", "tests", "--data.val", "tests"],
            ["not a shard folder"],
        ),
        (["evaluate", "/none", "--data", "tests"], ["'/none' does not exist"]),
        (["trian"], ["unknown command 'trian'", "train"]),
        (["evaluate", "tests", "--data", "tests", "--device", "gpu"], ["'gpu'"]),
        (["recipes", "--all"], ["no options"]),
    ],
)
def test_one_clear_line(capsys, arguments, words):
    assert main("python -m pipeline", "", COMMANDS, arguments) == 2
    said = capsys.readouterr()
    check_one_line(said.out, said.err, words)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_an_interrupted_command_says_so_in_one_line(capsys, monkeypatch, name):
    def interrupted(args: list[str]) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], run=interrupted))
    assert main("python -m pipeline", "", COMMANDS, [name]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("interrupted")
    assert len(said.err.splitlines()) == 1
    monkeypatch.setenv("DETR_DEBUG", "1")
    assert main("python -m pipeline", "", COMMANDS, [name], "gone") == 130
    said = capsys.readouterr()
    assert said.err.startswith("Traceback")
    assert said.err.endswith("gone\n")


def test_without_line_characters_the_message_is_the_same(run_command):
    """tyro's frames are of hyphens where the locale has no others."""
    arguments = ("pipeline", "predict", "tests", "--outptu", "found")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = [run_command(*arguments, **environment).stderr for environment in ({}, plain)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "tests", "--outptu", "found"], ["unknown option --outptu", "--output"]),
        (
            ["train", "demo", "--output", "x", "--data.train", "/none", "--data.val", "/none"],
            ["'/none' does not exist", "data_prep convert"],
        ),
        (["evaluate", "tests", "--data", "tests"], ["not a checkpoint"]),
    ],
)
def test_of_a_process_nothing_but_the_line_is_seen(run_command, arguments, words):
    """No warning either of what the commands import."""
    done = run_command("pipeline", *arguments)
    assert done.returncode == 2
    check_one_line(done.stdout, done.stderr, words)


def test_help_shows_an_example(run_command):
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["recipes"]):
        done = run_command("pipeline", *arguments)
        assert done.returncode == 0
        assert "deformable_detr_r50" in done.stdout or "python -m pipeline" in done.stdout
