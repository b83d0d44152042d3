"""Command lines of the pipeline: typed options by tyro, mistakes as one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Annotated, Any, TypeVar

import tyro

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.recipes import RECIPES, recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """One word after `python -m PACKAGE`: what runs it, and a line of help."""

    run: Callable[[list[str]], None]
    help: str


def main(prog: str, description: str, commands: dict[str, Command], argv: Sequence[str]) -> int:
    """Runs `argv` and returns the exit status: 0, or 2 after a user's mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND …\n\n{description}\n\ncommands:")
        for name, command in commands.items():
            print(f"  {name:<16}{command.help}")
        print(f"\n{prog} COMMAND --help shows a command's options.")
        return 0 if argv else 2
    try:
        if argv[0] not in commands:
            raise UserError(f"unknown command {argv[0]!r}: expected one of {', '.join(commands)}")
        commands[argv[0]].run(list(argv[1:]))
    except (UserError, OSError) as error:  # OSError: a file that cannot be read or written
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def parse(kind: type[T], args: list[str], prog: str, description: str, default: Any = None) -> T:
    """`kind` (a dataclass) from options. A mistake raises `UserError` with the nearest match."""
    said = io.StringIO()
    os.environ.setdefault("COLUMNS", "100")
    try:
        with contextlib.redirect_stderr(said):
            given = {} if default is None else {"default": default}
            return tyro.cli(kind, args=args, prog=prog, description=description, **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(said.getvalue(), _options_of(kind))) from None


def _options_of(kind: Any, prefix: str = "--") -> list[str]:
    """Every option that tyro makes of a dataclass, nested ones with dots."""
    options = []
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        if field.type is RunOptions:
            options += _options_of(RunConfig, prefix)
        elif dataclasses.is_dataclass(field.type):
            options += _options_of(field.type, f"{name}.")
        else:
            options.append(name)
    return options


def _one_line(panel: str, known: list[str]) -> str:
    """tyro's framed message as one line: what is wrong, and the option it might have meant."""
    # A title in the frame, then the message, then after a rule what surrounds it. Where the
    # terminal has no line characters, the frame is a rule of hyphens below the title alone.
    rows = [line.strip("│╭╰╮╯ ") for line in panel.splitlines()][1:]
    rows = list(dropwhile(_is_rule, rows))
    lines = [row for row in takewhile(lambda row: not _is_rule(row), rows) if row]
    first = " ".join(line for line in lines if not line.startswith("--")) or panel.strip()
    if first.startswith("Unrecognized"):
        given = first.split(": ", 1)[1].split(", ")[0].split("=")[0]
        nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the options"
        return f"unknown option {given}: {hint}"
    if first.startswith("Missing"):
        return f"{lines[0]} {', '.join(line for line in lines if line.startswith('--'))}"
    return first


def _is_rule(row: str) -> bool:
    return len(row) > 2 and set(row) <= {"─", "-"}


def parse_run(
    kind: Callable[..., T], args: list[str], prog: str, description: str, **fixed: Any
) -> T:
    """Options of a command whose first word is a recipe: `kind` must have a `config: RunOptions`
    field; the recipe's values are its defaults."""
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            args = ["demo", *args]
        else:
            raise UserError(f"{prog}: expected a recipe first, one of {', '.join(RECIPES)}")
    default = kind(config=recipe(args[0]), **fixed)
    return parse(type(default), args[1:], f"{prog} {args[0]}", description, default)


RunOptions = Annotated[RunConfig, tyro.conf.arg(name="")]
REQUIRED: Any = tyro.MISSING
