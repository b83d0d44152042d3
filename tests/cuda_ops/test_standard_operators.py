"""The operators for export against their definitions."""

import pytest
import torch
from torch.nn.functional import interpolate

from cuda_ops import reference, standard


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("shapes", [[(7, 5)], [(9, 12), (5, 6), (1, 3), (1, 1)]])
def test_attention_also_far_outside_of_the_maps(numbers, shapes):
    generator = torch.Generator().manual_seed(len(shapes) + numbers)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    value, logits = normal(2, tokens, 3, 8), normal(2, 11, 3, levels * 4)
    references = torch.rand(2, 11, levels, numbers, generator=generator, dtype=torch.float64)
    offsets = 5 * normal(2, 11, 3, levels, 4, 2)
    arguments = (value, shapes, references, offsets, logits)
    expected = reference.fused_deformable_attention(*arguments)
    found = standard.fused_deformable_attention(*arguments)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert (expected == 0).float().mean() < 0.5  # most points are on the maps

    halves = (value.bfloat16(), shapes, references.float(), offsets.bfloat16(), logits.bfloat16())
    found = standard.fused_deformable_attention(*halves)
    assert found.dtype == torch.bfloat16
    # One unit in the last place: both round a float32 once.
    torch.testing.assert_close(
        found, reference.fused_deformable_attention(*halves), atol=1e-6, rtol=2**-7
    )


@pytest.mark.parametrize(
    ("channels", "groups", "deformable", "stride", "padding", "dilation"),
    [(8, 1, 1, 1, 1, 1), (8, 4, 1, 2, 1, 1), (12, 2, 3, 1, 2, 2), (6, 1, 2, 2, 0, 1)],
)
def test_deformable_convolution(channels, groups, deformable, stride, padding, dilation):
    generator = torch.Generator().manual_seed(channels * stride + padding)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    image, weight = normal(2, channels, 11, 14), normal(12, channels // groups, 3, 3)
    out = [(side + 2 * padding - dilation * 2 - 1) // stride + 1 for side in (11, 14)]
    offset = 3 * normal(2, 2 * deformable * 9, *out)
    mask = normal(2, deformable * 9, *out).sigmoid()
    arguments = (image, offset, mask, weight, normal(12), stride, padding, dilation)
    expected = reference.modulated_deform_conv2d(*arguments)
    found = standard.modulated_deform_conv2d(*arguments)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


def test_the_nearest_neighbour_is_torchs_at_every_size():
    for old in range(1, 700):
        line = torch.arange(old, dtype=torch.float32)[None, None, None]
        for stride in (8, 16, 32, 64):
            size = (1, -(-old // stride))
            assert torch.equal(standard.nearest(line, size), interpolate(line, size=size))
    small = torch.arange(6.0).view(1, 1, 2, 3)
    for size in ((2, 3), (4, 5), (3, 6), (11, 7)):
        assert torch.equal(standard.nearest(small, size), interpolate(small, size=size))
