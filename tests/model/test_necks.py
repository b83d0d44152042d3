"""The necks of Table 2 against sums written out here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.neck import FPN, BiFPN, HalvingConv2d, build_neck

SHAPES = [(13, 18), (7, 9), (4, 5), (2, 3)]


def maps() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 32, *shape, dtype=torch.float64) for shape in SHAPES]


def test_fpn_adds_from_coarse_to_fine() -> None:
    given = maps()
    neck = FPN(4, 32).double()
    inner, outer = neck.pyramid.inner_blocks, neck.pyramid.layer_blocks
    expected: list[Tensor] = []
    above: Tensor | None = None
    for level in (3, 2, 1, 0):
        lateral = inner[level](given[level])
        if above is not None:
            lateral = lateral + F.interpolate(above, size=SHAPES[level], mode="nearest")
        above = lateral
        expected.insert(0, outer[level](lateral))
    for found, wanted in zip(neck(given), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_bifpn_is_its_equations() -> None:
    """EfficientDet's section 3.3, for levels 3 to 6, with fast normalised fusion."""
    p3, p4, p5, p6 = maps()
    neck = BiFPN(4, 32).double()
    with torch.no_grad():
        for fusion in (*neck.down, *neck.up):
            fusion.weights.uniform_(-0.5, 2.0)

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[-2:], mode="nearest")

    def down(x: Tensor, like: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, 2, 1)
        assert pooled.shape[-2:] == like.shape[-2:]
        return pooled

    def node(fusion: torch.nn.Module, *inputs: Tensor) -> Tensor:
        w = fusion.weights.clamp(min=0)
        mean = sum(w[i] * x for i, x in enumerate(inputs)) / (w.sum() + 1e-4)
        mean = mean * mean.sigmoid()
        mean = F.conv2d(mean, fusion.depthwise.weight, padding=1, groups=32)
        mean = F.conv2d(mean, fusion.pointwise.weight)
        return F.group_norm(mean, 32, fusion.norm.weight, fusion.norm.bias)

    m5 = node(neck.down[0], p5, up(p6, p5))
    m4 = node(neck.down[1], p4, up(m5, p4))
    o3 = node(neck.down[2], p3, up(m4, p3))
    o4 = node(neck.up[0], p4, m4, down(o3, p4))
    o5 = node(neck.up[1], p5, m5, down(o4, p5))
    o6 = node(neck.up[2], p6, down(o5, p6))
    for found, wanted in zip(neck([p3, p4, p5, p6]), (o3, o4, o5, o6), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["plain", "fpn", "bifpn"])
def test_every_neck_gives_the_same_shapes_and_trains(name: str) -> None:
    config = ModelConfig(hidden_dim=32, neck=name)  # type: ignore[arg-type]
    neck = build_neck(config, [8, 16, 24])
    sizes = ((13, 18), (7, 9), (4, 5))
    features = [torch.randn(2, c, *s) for c, s in zip((8, 16, 24), sizes, strict=True)]
    found = neck(features)
    assert [tuple(x.shape) for x in found] == [(2, 32, h, w) for h, w in SHAPES]
    torch.stack([x.square().mean() for x in found]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (8, 2), (2, 2), (2, 3), (5, 3)])
def test_narrow_maps_are_halved_in_bfloat16_too(shape: tuple[int, int]) -> None:
    """Of memory that held something else before. torch's own leaves some of it where one cell is
    all the width: on CPUs with AMX."""
    torch.manual_seed(0)
    halve = HalvingConv2d(256, 256).to(memory_format=torch.channels_last)
    x = torch.randn(1, 256, *shape).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = halve(x)
        for _ in range(10):
            before = [torch.full((2**size,), torch.nan) for size in range(8, 21)]
            del before
            with torch.autocast("cpu", torch.bfloat16):
                found = halve(x)
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
