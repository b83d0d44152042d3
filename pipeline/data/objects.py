"""Which annotations are objects that can be trained on or evaluated.

`data_prep convert` reports whatever is wrong with an annotation and keeps it; here such an
annotation is left aside, judged as `data_prep/checks.py` does.
"""

import sys
from collections.abc import Iterable
from typing import Any

LARGEST = sys.float_info.max
NUMBERS = (int, float)  # as JSON gives them; True is of neither type


def objects(
    annotations: Iterable[dict[str, Any]], categories: Iterable[int]
) -> list[dict[str, Any]]:
    """The annotations with a box of four finite numbers and one of the `categories`."""
    known = set(categories)
    return [a for a in annotations if _has_category(a, known) and _has_box(a)]


def _has_category(annotation: dict[str, Any], known: set[int]) -> bool:
    category = annotation.get("category_id")
    return type(category) is int and category in known  # 1.0 and True equal 1, and are no ids


def _has_box(annotation: dict[str, Any]) -> bool:
    box = annotation.get("bbox")
    return (
        isinstance(box, list)
        and len(box) == 4
        # NaN is no less than anything; a whole number may be beyond the floats.
        and all(type(v) in NUMBERS and abs(v) <= LARGEST for v in box)
    )
