"""The small backbone: its resolutions, dilation, and deformable convolutions."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from model.backbone import DeformableConv2d, TinyBackbone, build_backbone
from model.config import ModelConfig


def backbone(**changes: Any) -> TinyBackbone:
    torch.manual_seed(0)
    built = build_backbone(ModelConfig(**{"backbone": "tiny"} | changes))
    assert isinstance(built, TinyBackbone)
    return built.double()


@pytest.mark.parametrize("name", ["tiny", "tiny_dcn"])
def test_dilation_keeps_the_resolution_of_the_last_stage(name: str) -> None:
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    plain = backbone(backbone=name, num_levels=1)
    dilated = backbone(backbone=name, num_levels=1, dilation=True)
    assert [x.shape[-2:] for x in plain.pyramid(images)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [x.shape[-2:] for x in dilated.pyramid(images)] == [(16, 24), (8, 12), (4, 6), (4, 6)]


def test_a_dilated_stage_is_the_strided_one_at_every_place() -> None:
    """Without norms (which see the whole map), at even places the dilated stage gives what the
    strided one gives: the same weights look at the same pixels."""
    images = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    maps = []
    for dilation in (False, True):
        net = backbone(num_levels=1, dilation=dilation)
        stage = net.stages[-1]
        stage.bn1, stage.bn2, stage.downsample[1] = nn.Identity(), nn.Identity(), nn.Identity()
        maps.append(net(images)[0])
    strided, dilated = maps
    assert strided.shape[-2:] == (4, 4)
    torch.testing.assert_close(dilated[..., ::2, ::2], strided)


def test_deformable_convolutions_are_in_c3_to_c5_and_are_torchvisions() -> None:
    net = backbone(backbone="tiny_dcn")
    found = {n: m for n, m in net.named_modules() if isinstance(m, DeformableConv2d)}
    assert list(found) == ["stages.1.conv2", "stages.2.conv2", "stages.3.conv2"]
    conv = found["stages.2.conv2"]
    x = torch.rand(2, 96, 7, 9, dtype=torch.float64)
    # It starts as a plain convolution of half the strength ...
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, padding=1) / 2)
    nn.init.normal_(conv.offsets.weight, std=0.1)
    nn.init.normal_(conv.offsets.bias)
    # ... and is DCNv2: of 3 x 9 predicted channels the last 9 are masks.
    predicted = conv.offsets(x)
    expected = torchvision.ops.deform_conv2d(
        x, predicted[:, :18], conv.weight, padding=1, mask=predicted[:, 18:].sigmoid()
    )
    torch.testing.assert_close(conv(x), expected)
    conv(x).sum().backward()
    assert conv.offsets.weight.grad.abs().sum() > 0


def test_both_start_from_the_same_weights() -> None:
    plain, deformable = backbone().state_dict(), backbone(backbone="tiny_dcn").state_dict()
    assert {k for k in deformable if ".offsets." not in k} == plain.keys()
    assert all(torch.equal(plain[k], deformable[k]) for k in plain)
