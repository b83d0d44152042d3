"""Numbers that no computation takes, in every option of a training and of a job."""

import dataclasses
import math
from collections.abc import Callable
from datetime import timedelta
from typing import get_args, get_origin, get_type_hints

import pytest

from jobs.__main__ import COMMANDS as JOBS
from jobs.__main__ import SubmitOptions, check
from pipeline.__main__ import COMMANDS
from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.engine import deepspeed_config, learning_rate_factor
from pipeline.recipes import recipe

HOSTILE = {
    float: (math.inf, -math.inf, math.nan, 1e300, -1.0, 0.0, 1e-300),
    int: (0, -1, 2**31, 2**63, 10**30, -(10**30)),
}


def numbers(kind: type) -> list[tuple[str, type]]:
    """(field, int or float) of the fields of a dataclass that hold numbers, tuples of them too."""
    found = []
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if inner in (int, float):
            found.append((name, inner))
    return found


CONFIG = recipe("demo")
OPTIONS = [(None, *number) for number in numbers(RunConfig)] + [
    (section.name, *number)
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(getattr(CONFIG, section.name))
    for number in numbers(type(getattr(CONFIG, section.name)))
]
OF_JOBS = numbers(SubmitOptions)


def test_the_options_are_all_there():
    assert {"engine", "optimizer", "schedule", "augment", "model", "data", None} == {
        section for section, _, _ in OPTIONS
    }
    assert len(OPTIONS) > 60
    assert {name for name, _ in OF_JOBS} >= {"workers", "grace", "resize_interval", "restarts"}


def changed(section: str | None, name: str, value: object) -> RunConfig:
    if section is None:
        return dataclasses.replace(CONFIG, **{name: value})
    part = getattr(CONFIG, section)
    if isinstance(old := getattr(part, name), tuple):
        value = (value,) * max(1, len(old))
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(part, **{name: value})})


def use(config: RunConfig) -> None:
    """What is computed of a config before anything is read."""
    assert RunConfig.from_json(config.to_json()) == config
    config.digest()
    timedelta(seconds=config.engine.collective_timeout)
    int(config.data.cache_gb * 1e9)
    deepspeed_config(config, 1)
    learning_rate_factor(config.schedule, 10.0)(3)


def refusal(action: Callable[[], object]) -> str:
    """What an action says against a number; empty where it takes it."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("section", "name", "kind"), OPTIONS)
def test_a_number_of_a_recipe_is_refused_in_a_line_or_taken(section, name, kind):
    for value in HOSTILE[kind]:
        if said := refusal(lambda value=value: changed(section, name, value)):
            assert "expected" in said
            assert name in said or section == "augment"
            assert "\n" not in said
        else:
            use(changed(section, name, value))


@pytest.mark.parametrize(("name", "kind"), OF_JOBS)
def test_a_number_of_a_job_is_refused_in_a_line_or_taken(name, kind, tmp_path):
    def checked(value: float) -> SubmitOptions:
        options = SubmitOptions(config=CONFIG, output=tmp_path, **{name: value})
        check(options)
        return options

    for value in HOSTILE[kind]:
        if said := refusal(lambda value=value: checked(value)):
            assert "expected" in said
            assert "\n" not in said
        else:
            assert abs(value) < 2**31
            assert len(str(round(checked(value).grace))) < 10  # as Ray is told it


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--engine.collective-timeout inf", "engine.collective_timeout: got inf"),
        ("--engine.collective-timeout 1e300", "expected 1 to 1e6 seconds"),
        ("--data.cache-gb 1e300", "at most 1e9"),
        ("--optimizer.lr nan", "optimizer.lr: got nan, expected a finite number"),
        (f"--schedule.epochs 1{'0' * 30}", "expected less than 2**31"),
        (f"--seed 1{'0' * 5000}", "--seed"),
    ],
)
@pytest.mark.parametrize("submit", [False, True])
def test_at_the_command_line_it_is_one_line(option, words, submit, tmp_path, capsys):
    given = ["submit" if submit else "train", "demo", "--output", str(tmp_path), *option.split()]
    assert main("prog", "", JOBS if submit else COMMANDS, given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert "bug" not in line


@pytest.mark.parametrize("value", ["nan", "inf", "1e300"])
@pytest.mark.parametrize("option", ["--grace", "--resize-interval"])
def test_times_of_a_job_are_bounded(option, value, tmp_path, capsys):
    assert main("prog", "", JOBS, ["submit", "demo", "--output", str(tmp_path), option, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected" in line
