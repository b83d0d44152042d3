"""`python -m pipeline describe` and `recipes`."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from pipeline.cli import parse
from pipeline.errors import UserError
from pipeline.recipes import DEMO_SCALE, RECIPES


@dataclass(frozen=True)
class DescribeOptions:
    recipes: Positional[tuple[str, ...]] = ()
    """Recipes to describe. None: all of them."""
    output: Path | None = None
    """Also write the table: a .md file, or a .json one with exact numbers."""


def run_describe(args: list[str]) -> None:
    options = parse(
        DescribeOptions,
        args,
        "python -m pipeline describe",
        "Parameters, multiply-adds and training memory of recipes for an image of 3x800x1066, "
        "beside the published figures.\n\n"
        "Example: python -m pipeline describe deformable_detr_r50 detr_r50_dc5 --output costs.md",
    )
    from pipeline.describe import check_output, describe, table, write

    if options.output:
        check_output(options.output)
    costs = [describe(name) for name in options.recipes or RECIPES]
    print(table(costs))
    if options.output:
        write(costs, options.output)


def run_recipes(args: list[str]) -> None:
    if args and args[0] not in ("-h", "--help"):
        raise UserError(f"python -m pipeline recipes takes no options, got {args}")
    for name, function in RECIPES.items():
        about = (function.__doc__ or "").split("\n\n")[0]
        print(name, *textwrap.wrap(" ".join(about.split()), 92), sep="\n    ")
    print(
        f"NAME{DEMO_SCALE}\n    Any of these at demo scale: small, from scratch, minutes on a CPU."
    )
