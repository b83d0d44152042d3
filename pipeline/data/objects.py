"""Which annotations are objects that can be trained on or evaluated.

`data_prep convert` reports whatever is wrong with an annotation and keeps it; here such an
annotation is left aside.
"""

import math
from collections.abc import Iterable
from typing import Any


def objects(
    annotations: Iterable[dict[str, Any]], categories: Iterable[int]
) -> list[dict[str, Any]]:
    """The annotations with a box of four finite numbers and one of the `categories`."""
    known = set(categories)
    return [a for a in annotations if a.get("category_id") in known and _has_box(a)]


def _has_box(annotation: dict[str, Any]) -> bool:
    box = annotation.get("bbox")
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    )
