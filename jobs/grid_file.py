"""A grid of one's own: a YAML file with a baseline and axes, or a Python file with `grid()`."""

import importlib.util
import itertools
import os
import traceback
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from jobs.grid import Cell, Grid, changed, name_of, nearest
from jobs.papers_grids import PAPERS_GRIDS
from pipeline.errors import UserError
from pipeline.recipes import recipe

KEYS = ("name", "baseline", "set", "axes", "cells")
MOST_CELLS = 1000  # beyond, an axis was surely not meant so
# Keys of a cell beside fields: another recipe to start from, and that it is not trained but
# evaluated with test-time augmentation.
RECIPE, TTA = "recipe", "tta"


def find_grid(name: str) -> Grid:
    """One of the paper's by its name, or that of a file."""
    if name in PAPERS_GRIDS:
        return PAPERS_GRIDS[name]()
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".py") and path.is_file():
        try:
            return from_python(path) if path.suffix == ".py" else from_yaml(path)
        except ValueError as error:  # a UserError, or a number with too many digits to be told
            raise UserError(f"{path}: {error}") from None
    raise UserError(
        f"grid {name!r}: {nearest(name, PAPERS_GRIDS)}expected one of {', '.join(PAPERS_GRIDS)}, "
        f"or a file that exists and ends in .yaml or .py"
    )


def from_python(path: Path) -> Grid:
    """What the file's `grid()` returns. The file is executed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "grid", None)):
            raise UserError("got no function grid(), expected one that returns a jobs.grid.Grid")
        grid = module.grid()
    except UserError:
        raise
    except Exception as error:  # of the user's code, whatever it is
        raise UserError(f"{place(error, path)}{type(error).__name__}: {error}") from None
    if not isinstance(grid, Grid):
        raise UserError(f"grid() returned {type(grid).__name__}, expected a jobs.grid.Grid")
    return grid


def place(error: Exception, path: Path) -> str:
    """Where in the file it was raised: "line 3: "."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
    return f"line {lines[-1]}: " if lines else ""


def from_yaml(path: Path) -> Grid:
    """Raises `UserError` for every key, field or value that cannot be meant."""
    content = read(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"got {key!r}: {nearest(key, KEYS)}expected {', '.join(KEYS)}")
    if not isinstance(content.get("baseline"), str):
        raise UserError(
            f"baseline: got {content.get('baseline')!r}, expected a recipe, such as "
            f"baseline: deformable_detr_r50"
        )
    base = content["baseline"]
    common = mapping(content, "set")
    baseline = changed_in("set", base, common)
    cells = [Cell("baseline", base, common)]
    axes = mapping(content, "axes")
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"axes: {name}: got {values!r}, expected a list of values")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST_CELLS:
        raise UserError(f"axes: got {count} combinations, expected at most {MOST_CELLS}")
    for values in itertools.product(*axes.values()) if axes else ():
        changes = {**common, **dict(zip(axes, values, strict=True))}
        config = changed_in("axes", base, changes)
        cells.append(Cell(name_of(baseline, config, axes), base, changes))
    if [cell.name for cell in cells].count("baseline") > 1:
        del cells[0]  # the axes come to the baseline, too; twice is for Grid to refuse
    for name, changes in mapping(content, "cells").items():
        where = f"cells: {name}"
        if not isinstance(changes, dict):
            raise UserError(f"{where}: got {changes!r}, expected fields with their values")
        own = {**common, **changes}
        of = own.pop(RECIPE, base)
        if not isinstance(of, str):
            raise UserError(f"{where}: {RECIPE}: got {of!r}, expected a recipe's name")
        tta = own.pop(TTA, False)
        if not isinstance(tta, bool):
            raise UserError(f"{where}: {TTA}: got {tta!r}, expected true or false")
        changed_in(where, of, own)
        cells.append(Cell(str(name), of, own, tta=tta))
    if len(cells) == 1:
        raise UserError("got neither axes nor cells, expected some beside the baseline")
    return Grid(str(content.get("name", path.stem)), tuple(cells), baseline="baseline")


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file. Raises `UserError` with the line of a mistake."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Strict)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"line {line}: {error.problem}") from None
    except RecursionError:
        raise UserError("nested too deeply, expected two levels") from None
    except OSError:
        raise
    except Exception as error:  # yaml's constructors fail in many ways: dates, numbers, bytes
        raise UserError(f"not YAML: {(str(error).splitlines() or [''])[0][:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"got {type(content).__name__}, expected the keys {', '.join(KEYS)}")
    return content


class Strict(yaml.SafeLoader):
    """YAML in which a key given twice is a mistake, rather than the second value the only one; and
    so is an alias, by which a few lines would stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"got the alias *{event.anchor}, expected the value itself",
                event.start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"got {key!r} twice, expected it once", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


def mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    """The value of `key`, names to values. Raises `UserError` where it is something else."""
    value = content.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{key}: got {value!r}, expected names with values")
    return value


def changed_in(where: str, base: str, changes: dict[str, Any]) -> Any:
    """A recipe with changes made to it. Raises `UserError` that says where a wrong one stands."""
    try:
        return changed(recipe(base), changes)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
