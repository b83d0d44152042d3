"""The rest of the DETR family, as named experiments: see docs/family.md."""

from collections.abc import Callable

from pipeline.config import RunConfig

FAMILY: tuple[Callable[[], RunConfig], ...] = ()
