"""The precision of what must not be rounded to 16 bits: boxes, references, costs, losses."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(x: Tensor) -> Tensor:
    """`x` as it is in float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Switches autocast off on the device of `x`; the meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class FullPrecisionLinear(nn.Linear):
    """A linear layer evaluated and returned in float32 at the least, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight, bias = full_precision(self.weight), full_precision(self.bias)
            return F.linear(full_precision(x), weight, bias)


class FullPrecisionGroupNorm(nn.GroupNorm):
    """Group norm evaluated in float32 at the least and returned in its parameters' dtype.

    CUDA's autocast evaluates it so anyway; a CPU is four times as fast as in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = full_precision(self.weight), full_precision(self.bias)
        normed = F.group_norm(full_precision(x), self.num_groups, weight, bias, self.eps)
        return normed.to(self.weight.dtype)
