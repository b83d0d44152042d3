"""What a grid is: named cells, each a recipe with changes, and the runs that they come to."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cli import parse
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.recipes import at_demo_scale, demo, recipe

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")
LONGEST_NAME = 120  # of a cell, which becomes a folder and part of a job's id
PAPERS_EPOCHS = 50  # what the demo's epochs stand for
# Neither an experiment's own: a cell has a name, and --seeds repeats it.
NOT_CHANGED = ("recipe", "seed")


@dataclass(frozen=True)
class Cell:
    """One experiment: `changes` (values by dotted field, such as "model.num_points") on `base`, a
    recipe's name or a whole `RunConfig`. `published`: the key of what was published of it, such as
    "table2/fpn"; empty without. `tta`: nothing is trained; the best checkpoint of the cell that is,
    with the same config, is evaluated with test-time augmentation."""

    name: str
    base: str | RunConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    tta: bool = False

    def config(self, small: bool = False) -> RunConfig:
        """The run's config; `small`: at demo scale.

        At demo scale the base becomes small and the changes are made to that, but for those of the
        schedule: it is the demo's, of a length in proportion to the full one's, so that cells which
        differ in epochs still do.
        """
        base = recipe(self.base) if isinstance(self.base, str) else self.base
        full = changed(base, self.changes)
        if not small:
            return full
        rest = {name: x for name, x in self.changes.items() if not name.startswith("schedule.")}
        config = changed(at_demo_scale(base), rest)
        epochs = max(1, round(full.schedule.epochs * demo().schedule.epochs / PAPERS_EPOCHS))
        return replace(config, schedule=replace(config.schedule, epochs=epochs))


@dataclass(frozen=True)
class Grid:
    """Cells with names of their own; `baseline`: the one that the others are held against, the
    first if empty."""

    name: str
    cells: tuple[Cell, ...]
    baseline: str = ""

    def __post_init__(self) -> None:
        for name in (self.name, *(cell.name for cell in self.cells)):
            if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
                raise UserError(
                    f"grid {self.name!r}: got the name {name!r}, expected at most {LONGEST_NAME} "
                    f"letters, digits and _ . , = + - that begin with a letter or digit"
                )
        if not self.cells:
            raise UserError(f"grid {self.name}: got no cells, expected at least one")
        names = [cell.name for cell in self.cells]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"grid {self.name}: got {names.count(name)} cells with the name {name!r}, "
                    f"expected names that differ; rename one, or remove a value given twice"
                )
        if self.baseline and self.baseline not in names:
            raise UserError(
                f"grid {self.name}: got the baseline {self.baseline!r}, expected one of its cells: "
                f"{', '.join(names)}"
            )

    @property
    def reference(self) -> str:
        return self.baseline or self.cells[0].name


@dataclass(frozen=True)
class Entry:
    """One cell with one seed. `folder`: of its run, relative to the grid's. Cells that come to the
    same config, as table 3's ResNets do at demo scale, share a run."""

    cell: str
    seed: int
    config: RunConfig
    folder: str
    published: str
    differences: dict[str, list[Any]]
    """By dotted field: the baseline's value and this cell's."""
    evaluates: str = ""
    """The folder of the run whose best checkpoint this one evaluates; empty for one that trains."""

    @property
    def run(self) -> str:
        """The name of the run."""
        return self.folder.rpartition("/")[2]


def entries(
    grid: Grid, small: bool, seeds: int, common: Callable[[RunConfig], RunConfig]
) -> list[Entry]:
    """Every cell with every seed, seeds outermost. `common` sets what all cells share, such as
    where the data lies."""
    configs = {}
    for cell in grid.cells:
        try:
            configs[cell.name] = common(cell.config(small))
        except ValueError as error:
            raise UserError(f"grid {grid.name}, cell {cell.name}: {error}") from None
    baseline = configs[grid.reference]
    found: list[Entry] = []
    first: dict[RunConfig, Entry] = {}
    for extra in range(seeds):
        for cell in grid.cells:
            config = configs[cell.name]
            config = replace(config, seed=config.seed + extra)
            own = Entry(
                cell=cell.name,
                seed=config.seed,
                config=config,
                folder=f"runs/{cell.name}-seed{config.seed}",
                published=cell.published,
                differences=differences(baseline, config),
            )
            if cell.tta:
                found.append(replace(own, differences={**own.differences, "tta": [False, True]}))
            else:
                same = first.setdefault(replace(config, recipe=""), own)
                found.append(replace(own, config=same.config, folder=same.folder))
    augmented = {cell.name for cell in grid.cells if cell.tta}
    return [evaluating(grid, e, first) if e.cell in augmented else e for e in found]


def evaluating(grid: Grid, entry: Entry, trained: Mapping[RunConfig, Entry]) -> Entry:
    """The entry with the run that it evaluates, one of those trained, by their configs."""
    run = trained.get(replace(entry.config, recipe=""))
    if run is None:
        raise UserError(
            f"grid {grid.name}, cell {entry.cell}: tta: got no cell that is trained with its "
            f"config, expected one like it without tta"
        )
    return replace(entry, config=run.config, evaluates=run.folder)


def runs(found: Iterable[Entry]) -> list[Entry]:
    """One entry for each run: the first that comes to it."""
    return list({entry.folder: entry for entry in reversed(list(found))}.values())[::-1]


def differences(baseline: RunConfig, config: RunConfig) -> dict[str, list[Any]]:
    """By dotted field: [the baseline's value, the config's] where they differ."""
    mine, base = leaves(config), leaves(baseline)
    return {
        name: [base[name], value]
        for name, value in mine.items()
        if value != base[name] and name not in NOT_CHANGED
    }


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value, name = getattr(config, one.name), f"{prefix}{one.name}"
        found |= leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with other values in the named fields, checked as on the command line. Raises
    `UserError` for a field that does not exist (with the nearest) or a value of another type."""
    if not changes:
        return config
    present = leaves(config)
    arguments: list[str] = []
    for name, value in changes.items():
        if name in NOT_CHANGED:
            hint = "use --seeds N" if name == "seed" else "make it the cell's base"
            raise UserError(f"{name} is no field that a cell changes: {hint}")
        if name not in present:
            raise UserError(f"got {name!r}: {nearest(name, present)}expected a field of RunConfig")
        option = f"--{name.replace('_', '-')}"
        if isinstance(present[name], bool):
            arguments.append(option if truth(name, value) else no(option))
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        elif isinstance(value, Mapping) or value is None:
            raise UserError(f"{name}: got {value!r}, expected one value or a list")
        elif isinstance(value, bool):
            raise UserError(f"{name}: got {value}, expected a value like {present[name]!r}")
        elif isinstance(present[name], tuple):
            arguments += [option, *str(value).split()]
        else:
            arguments.append(f"{option}={value}")
    try:
        return parse(RunConfig, arguments, "grid", "", config)
    except UserError as error:
        # It speaks of options; those are fields here, which YAML and Python write with "_".
        raise UserError(re.sub(r"--([\w.-]+)", spelled, str(error))) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was perhaps meant, as a question; empty where none is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}? " if found else ""


def no(option: str) -> str:
    """The option that turns a flag off: `section.no-name` of `section.name`."""
    section, _, name = option.rpartition(".")
    return f"{section}.no-{name}"


def spelled(option: re.Match[str]) -> str:
    """The option that was matched, as its field is spelled: with underscores."""
    return option[1].replace("-", "_")


def truth(name: str, value: Any) -> bool:
    """A boolean of a grid file or an option. Raises `UserError` for anything but true and false."""
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise UserError(f"{name}: got {value!r}, expected true or false")
    return words[str(value).lower()]


def name_of(baseline: RunConfig, config: RunConfig, fields: Iterable[str]) -> str:
    """A cell's name: those of the fields in which it differs from the baseline, with its values,
    such as "num_points=1,neck=fpn"; "baseline" where it differs in none."""
    base, mine = leaves(baseline), leaves(config)
    last = [name.rpartition(".")[2] for name in mine]
    parts = []
    for name in fields:
        if mine[name] != base[name]:
            short = name.rpartition(".")[2]
            parts.append(f"{short if last.count(short) == 1 else name}={shown(mine[name])}")
    return ",".join(parts) or "baseline"


def shown(value: Any) -> str:
    """A value in a name: of the characters that names may have."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(map(shown, value)) or "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-")
