"""Command lines of the pipeline: typed options by tyro, mistakes as one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Annotated, Any, TextIO, TypeVar

import tyro

from pipeline.config import RunConfig
from pipeline.data.urls import masked
from pipeline.errors import Unreachable, UserError
from pipeline.machine_errors import first_line, in_a_line
from pipeline.recipes import RECIPES, recipe

T = TypeVar("T")
EXPECTED = (UserError, FloatingPointError, Unreachable)  # their messages say all
DEBUG_OPTION, DEBUG_VARIABLE = "--debug", "DETR_DEBUG"
OTHERS_PATIENCE = 5.0  # seconds
WIDTH = 107  # of help texts: tyro keeps the line breaks of docstrings, which must fit its frame
EXAMPLE = re.compile(r"\n\s*Examples?:\s*")


@dataclass(frozen=True)
class Command:
    """One word after `python -m PACKAGE`: what runs it, and a line of help."""

    run: Callable[[list[str]], None]
    help: str


def main(
    prog: str,
    description: str,
    commands: dict[str, Command],
    argv: Sequence[str],
    interrupted: str = "interrupted; what it was writing is not complete",
) -> int:
    """Runs `argv` and returns the exit status: 0, 2 after a user's mistake or where the machine
    fails (a disk, its memory), 1 after any other failure, which is a bug; 130 after Ctrl-C, which
    is told as `interrupted`.

    Any is one line on stderr; with `--debug` anywhere in `argv`, or DETR_DEBUG=1 in the
    environment, which jobs inherit, its traceback comes before.
    """
    if DEBUG_OPTION in argv:
        argv = [word for word in argv if word != DEBUG_OPTION]
        os.environ[DEBUG_VARIABLE] = "1"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND …\n\n{description}\n\ncommands:")
        for name, command in commands.items():
            print(f"  {name:<19}{command.help}")
        print(f"\n{prog} COMMAND --help shows a command's options.")
        print(f"{DEBUG_OPTION} with any of them shows the traceback of an error.")
        return 0 if argv else 2
    try:
        if argv[0] not in commands:
            raise UserError(f"unknown command {argv[0]!r}: expected one of {', '.join(commands)}")
        commands[argv[0]].run(list(argv[1:]))
    except KeyboardInterrupt:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            sys.stderr.write(masked(traceback.format_exc()))
        print(interrupted, file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        return tell(error)
    return 0


def tell(error: Exception, to: TextIO | None = None) -> int:
    """Prints what went wrong as one line, and returns the exit status: 2 for a user's mistake or
    the machine's failure, 1 for a bug. Neither the line nor the traceback before it has a password
    or a signature of a URL."""
    if int(os.environ.get("LOCAL_RANK", "0")):
        # torchrun ends this process once another of its machine has told the same and ended.
        time.sleep(OTHERS_PATIENCE)
    to = to or sys.stderr
    if os.environ.get(DEBUG_VARIABLE) == "1":
        to.write(masked("".join(traceback.format_exception(error))))
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return 2  # whoever read the output has gone, such as `head`
    line, status = str(error) if isinstance(error, EXPECTED) else in_a_line(error), 2
    if line is None:
        remedy = "" if os.environ.get(DEBUG_VARIABLE) == "1" else f"{DEBUG_OPTION} shows where; "
        line = (
            f"{type(error).__name__}: {first_line(error)}; this is a bug of ours: {remedy}"
            f"docs/errors.md says where to report it"
        )
        status = 1
    print(f"error: {masked(' '.join(line.splitlines()))}", file=to, flush=True)
    return status


def is_expected(error: BaseException) -> bool:
    """Whether it is a user's mistake, the machine's failure or a training's own end: no bug."""
    return isinstance(error, EXPECTED) or in_a_line(error) is not None


def parse(kind: type[T], args: list[str], prog: str, description: str, default: Any = None) -> T:
    """`kind` (a dataclass) from options. A mistake raises `UserError` with the nearest match.

    What follows "Example:" in the description are commands, one a line. They come last in the
    help, broken as a shell takes them: tyro would join them.
    """
    said = io.StringIO()
    os.environ.setdefault("COLUMNS", str(WIDTH))
    purpose, *examples = EXAMPLE.split(description, maxsplit=1)
    try:
        with contextlib.redirect_stderr(said):
            given = {} if default is None else {"default": default}
            return tyro.cli(kind, args=args, prog=prog, description=purpose, **given)
    except SystemExit as stop:
        if not stop.code:
            for example in examples:
                print("\nexamples:", *map(_in_shell_lines, example.strip().splitlines()), sep="\n")
            raise
        raise UserError(_one_line(said.getvalue(), _options_of(kind))) from None


def _in_shell_lines(command: str) -> str:
    """A command, indented, with a backslash at the end of each line but the last."""
    held = re.sub(r"( -\S+) (?!-)", "\\1\0", command.strip())  # an option with its value
    lines = textwrap.wrap(
        held, 96, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "  " + " \\\n  ".join(lines).replace("\0", " ")


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
        # Others write --lr for our --optimizer.lr, which no likeness of letters finds.
        section = [option for option in known if option.endswith(f".{given.lstrip('-')}")]
        nearest = section or difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists the options"
        if given in ("True", "False"):
            hint = "a switch takes no value: --model.two-stage, or --model.no-two-stage"
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
    if args and args[0] in ("-h", "--help"):
        shown = "Defaults here are the demo's; with a recipe before --help they are the recipe's."
        default = kind(config=recipe("demo"), **fixed)
        description = description.replace("\n\n", f" {shown}\n\n", 1)
        return parse(type(default), args, f"{prog} RECIPE", description, default)
    if not args or args[0].startswith("-"):
        raise UserError(f"{prog}: expected a recipe first, one of {', '.join(RECIPES)}")
    default = kind(config=recipe(args[0]), **fixed)
    return parse(type(default), args[1:], f"{prog} {args[0]}", description, default)


RunOptions = Annotated[RunConfig, tyro.conf.arg(name="")]
REQUIRED: Any = tyro.MISSING
