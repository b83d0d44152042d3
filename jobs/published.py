"""Published numbers: the paper's Tables 1 to 3, those that the 12-epoch recipe is held against, and
what the authors of the rest of the DETR family give. `published.json` next to this file holds
them."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


@dataclass(frozen=True)
class Published:
    """One row of a table. `metrics`: percent, without those that the paper leaves out; `extra`:
    the row's other columns (params, gpu_hours, fps, …); `source`: where it stands, "Table 1, row 6"
    of the paper, or elsewhere."""

    key: str
    label: str
    ours: bool
    epochs: int | None
    metrics: dict[str, float]
    extra: dict[str, Any]
    source: str
    split: str


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, or the family: its rows in order, a caption in our words."""

    name: str
    caption: str
    split: str
    rows: tuple[Published, ...]


@cache
def tables() -> dict[str, Table]:
    """Tables 1 to 3, "recipe12", "family", "family_variants" without a grid, and what text gives of
    Figure 3, by name: "table1", …, "figure3"."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    found = {name: _table(name, table) for name, table in content["tables"].items()}
    known = {row.key: row for table in found.values() for row in table.rows}
    for name, figure in content["figures"].items():
        rows = tuple(known[key] for key in figure["rows"])
        found[name] = Table(name, figure["caption"], figure["split"], rows)
    return found


def _table(name: str, table: dict[str, Any]) -> Table:
    rows = []
    for number, values in enumerate(table["rows"], 1):
        row = dict(zip(table["columns"], values, strict=True))
        metrics = {metric: row.pop(metric) for metric in METRICS}
        source = row.pop("source", f"{name.replace('table', 'Table ')}, row {number}")
        rows.append(
            Published(
                key=f"{name}/{row.pop('key')}",
                label=row.pop("label"),
                ours=row.pop("ours"),
                epochs=row.pop("epochs", None),
                metrics={metric: value for metric, value in metrics.items() if value is not None},
                extra=row,
                source=source,
                split=table["split"],
            )
        )
    return Table(name, table["caption"], table["split"], tuple(rows))


def published(key: str) -> Published:
    """The row of that key, such as "table2/ms_inputs_k4"; an unknown one raises `UserError` with
    the nearest match."""
    known = {row.key: row for table in tables().values() for row in table.rows}
    if key not in known:
        raise UserError(f"unknown published row {key!r}: {meant(key, list(known))}")
    return known[key]


def meant(given: str, known: list[str]) -> str:
    """The remedy for a misspelled name: "did you mean 'x'?", else what was expected."""
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(known)}"
