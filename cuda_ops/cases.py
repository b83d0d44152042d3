"""Random inputs of the attention operators, for `check` and `benchmark`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops.reference import accumulation_dtype, sampling_locations

CLEARANCE = 1e-3  # pixels


@dataclass(frozen=True)
class Case:
    """The sizes of one call. N batch, M heads, D channels per head, Q queries, K points per head
    and level, R numbers in a reference point."""

    name: str
    N: int
    shapes: tuple[tuple[int, int], ...]
    M: int
    D: int
    Q: int
    K: int
    R: int = 2

    @property
    def S(self) -> int:
        """Tokens of all levels."""
        return sum(h * w for h, w in self.shapes)


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients; shapes as in `cuda_ops.ops.fused_deformable_attention`."""

    value: Tensor
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            self.value,
            self.reference_points,
            self.sampling_offsets,
            self.attention_logits,
        )


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    spread: float,
    margin: float = 0.0,
    clear: bool = False,
) -> Inputs:
    """Draws the inputs of `case`; drawn on the CPU, so that a seed gives the same on any device.

    Where Q = S, reference points are the centres of the tokens, as in the encoder; else they are
    uniform over the image widened by `margin` on each side. Offsets are normal with a standard
    deviation of `spread` pixels of their level (for 4-d references, whose boxes have sides of
    0.1 to 0.5, of `spread` half boxes divided by K). Values and logits are standard normal.

    With `clear`, no point is within `CLEARANCE` of a row or column of pixels. There derivatives by
    position jump, and two precisions may rightly find themselves on different sides.
    """
    levels = len(case.shapes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if case.Q == case.S:
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1)
            for h, w in case.shapes
        ]
        points = torch.cat(centres).double()[None, :, None].expand(case.N, -1, levels, -1)
    else:
        points = uniform(case.N, case.Q, 1, 2).expand(-1, -1, levels, -1)
        points = points * (1 + 2 * margin) - margin
    if case.R == 4:
        boxes = 0.1 + 0.4 * uniform(case.N, case.Q, 1, 2).expand(-1, -1, levels, -1)
        points = torch.cat([points, boxes], -1)

    def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.to(device, kind).contiguous().requires_grad_()

    def draw_offsets() -> Tensor:
        return (spread * normal(case.N, case.Q, case.M, levels, case.K, 2)).to(dtype).double()

    assert spread > 0 or not clear
    offsets = draw_offsets()
    while clear:
        rounded = points.to(accumulation_dtype(dtype)).double()
        sizes = torch.tensor([(w, h) for h, w in case.shapes])[:, None]
        pixels = sampling_locations(rounded, offsets, case.shapes) * sizes - 0.5
        near = ((pixels - pixels.round()).abs() < CLEARANCE).any(-1, keepdim=True)
        if not near.any():
            break
        offsets = torch.where(near, draw_offsets(), offsets)
    return Inputs(
        leaf(normal(case.N, case.S, case.M, case.D), dtype),
        leaf(points, accumulation_dtype(dtype)),
        leaf(offsets, dtype),
        leaf(normal(case.N, case.Q, case.M, levels * case.K), dtype),
    )
