"""The precision of what must not be rounded to 16 bits: boxes, references, costs, losses."""

from torch import Tensor, float64


def full_precision(x: Tensor) -> Tensor:
    """`x` as it is in float64, else in float32."""
    return x if x.dtype == float64 else x.float()
