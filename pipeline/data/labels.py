"""How COCO category ids become class columns, and back."""

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UserError

MOST_COLUMNS = 1000


@dataclass(frozen=True)
class Labels:
    """`category_of[c]` is the category id of class column c (-1: a column without a category)."""

    category_of: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.category_of)

    def column_of(self) -> dict[int, int]:
        """Category id -> class column."""
        return {category: c for c, category in enumerate(self.category_of) if category >= 0}


def build_labels(
    categories: list[dict[str, Any]],
    kind: Literal["contiguous", "contiguous_from_1", "category_id"],
) -> Labels:
    """Class columns for a dataset's `categories` (COCO records with `id` and `name`).

    Raises `UserError` when there are none, or when columns by category id would be absurdly many.
    """
    if not categories:
        raise UserError("the annotations name no categories: expected at least one")
    by_id = {int(c["id"]): str(c["name"]) for c in categories}
    ids = sorted(by_id)
    if kind == "contiguous":
        return Labels(tuple(ids), tuple(by_id[i] for i in ids))
    if kind == "contiguous_from_1":
        return Labels((-1, *ids), ("", *(by_id[i] for i in ids)))
    if ids[0] < 0 or ids[-1] >= MOST_COLUMNS:
        raise UserError(
            f"data.labels category_id: got category ids {ids[0]}..{ids[-1]}, expected them within "
            f"0..{MOST_COLUMNS - 1}; use --data.labels contiguous"
        )
    columns = range(ids[-1] + 1)
    return Labels(
        tuple(i if i in by_id else -1 for i in columns),
        tuple(by_id.get(i, "") for i in columns),
    )
