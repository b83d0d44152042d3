"""Backbones: images [N, 3, H, W] to the feature maps of stages C3, C4, C5 (or C5 alone)."""

from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from cuda_ops.ops import modulated_deform_conv2d
from model.config import TINY, ModelConfig
from model.precision import FullPrecisionGroupNorm, full_precision


class FrozenNormConv2d(nn.Conv2d):
    """A convolution without bias and the frozen batch norm after it, as one convolution.

    With s = weight / sqrt(variance + eps) the norm of the output is a convolution by s W with
    bias - s mean added, so no pass over the activations is spent on it, nor memory for backward.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        assert conv.bias is None
        super().__init__(**_geometry(conv), bias=False)
        self.weight = conv.weight
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        variance = full_precision(self.norm.running_var)
        scale = full_precision(self.norm.weight) * (variance + self.norm.eps).rsqrt()
        shift = full_precision(self.norm.bias) - full_precision(self.norm.running_mean) * scale
        weight = self.weight * scale[:, None, None, None]
        return self._conv_forward(x, weight.to(x.dtype), shift.to(x.dtype))


class DeformableConv2d(nn.Conv2d):
    """A modulated deformable convolution (DCNv2, arXiv:1811.11168) of one deformable group.

    Offsets and masks come from a convolution of the same geometry that starts at zero, that is as
    a plain convolution of half the strength.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(**_geometry(conv), bias=False)
        assert conv.bias is None
        self.weight = conv.weight
        self.offsets = _offsets_of(conv)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _deformed(self, self.offsets(x), x, weight, bias)


class DeformableNormConv2d(FrozenNormConv2d):
    """A `DeformableConv2d` and the frozen norm after it."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        super().__init__(conv, norm)
        self.offsets = _offsets_of(conv)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _deformed(self, self.offsets(x), x, weight, bias)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """How a convolution walks over its input, as arguments of another one."""
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    return {name: getattr(conv, name) for name in names}


def _offsets_of(conv: nn.Conv2d) -> nn.Conv2d:
    """Predicts two offsets and a mask for each tap of `conv` at each place; starts at zero."""
    taps = conv.weight.shape[-2] * conv.weight.shape[-1]
    offsets = nn.Conv2d(**_geometry(conv) | {"out_channels": 3 * taps, "groups": 1})
    for parameter in offsets.parameters():
        nn.init.zeros_(parameter)
    return offsets


def _deformed(
    conv: nn.Conv2d, predicted: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    taps = weight.shape[-2] * weight.shape[-1]
    offset, mask = predicted.split((2 * taps, taps), dim=1)
    return modulated_deform_conv2d(
        x,
        offset,
        mask.sigmoid(),
        weight,
        bias,
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
    )


class ResNet(nn.Module):
    """torchvision's ResNet or ResNeXt with frozen batch norm; stem and first stage not trained.

    `multi_level` gives C3-C5 at strides 8, 16, 32, else C5 alone; `dilation` makes C5 stride 16;
    a name that ends in `_dcn` has deformable 3x3 convolutions in C3-C5.
    """

    def __init__(self, name: str, dilation: bool, multi_level: bool) -> None:
        super().__init__()
        name, deformable = name.removesuffix("_dcn"), name.endswith("_dcn")
        net = getattr(torchvision.models, name)(
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        _fold_norms(net, deformable)
        self.conv1, self.relu, self.maxpool = net.conv1, net.relu, net.maxpool
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        self.multi_level = multi_level
        self.pyramid_channels = [256, 512, 1024, 2048]
        self.channels = self.pyramid_channels[1:] if multi_level else self.pyramid_channels[3:]
        self.conv1.requires_grad_(False)
        self.layer1.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.pyramid(images)
        return maps[1:] if self.multi_level else maps[3:]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """C2 to C5, at strides 4, 8, 16, 32."""
        c2 = self.layer1(self.maxpool(self.relu(self.conv1(images))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


class TinyBackbone(nn.Module):
    """A stem and four basic residual blocks, for small images on a CPU.

    Group norm, so that a step does not depend on how its batch is spread over processes.
    `deformable` and `dilation` are what they are in a ResNet.
    """

    def __init__(self, deformable: bool, dilation: bool, multi_level: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1),  # at this size a norm costs a tenth of a step
            nn.ReLU(inplace=True),
        )
        widths = [24, 32, 64, 96, 128]
        stages = [_residual_stage(inputs, outputs) for inputs, outputs in pairwise(widths)]
        self.stages = nn.ModuleList(stages)
        if dilation:
            _dilate(stages[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if deformable:
            for stage in stages[1:]:
                stage.conv2 = DeformableConv2d(stage.conv2)
        self.multi_level = multi_level
        self.pyramid_channels = widths[1:]
        self.channels = widths[2:] if multi_level else widths[4:]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.pyramid(images)
        return maps[1:] if self.multi_level else maps[3:]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """C2 to C5, at strides 4, 8, 16, 32."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def build_backbone(config: ModelConfig) -> ResNet | TinyBackbone:
    """The backbone `config` names, its weights in channels-last order."""
    multi_level = config.num_levels > 1
    backbone: ResNet | TinyBackbone
    if config.backbone in TINY:
        backbone = TinyBackbone(config.backbone == "tiny_dcn", config.dilation, multi_level)
    else:
        backbone = ResNet(config.backbone, config.dilation, multi_level)
    return backbone.to(memory_format=torch.channels_last)


def _residual_stage(inputs: int, outputs: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), _group_norm(outputs)
    )
    return BasicBlock(inputs, outputs, stride=2, downsample=shortcut, norm_layer=_group_norm)


def _dilate(stage: BasicBlock) -> None:
    """Keeps the stage's input resolution; what comes after its stride looks twice as far."""
    stage.conv1.stride = stage.downsample[0].stride = (1, 1)
    stage.conv2.dilation = stage.conv2.padding = (2, 2)


class _GroupNorm(FullPrecisionGroupNorm):
    """Group norm whose output stays in the input's dtype, for a short way to the next layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def _group_norm(channels: int) -> nn.Module:
    return _GroupNorm(8, channels)


def _fold_norms(net: nn.Module, deformable: bool) -> None:
    """Replace every (convolution, frozen norm) of a torchvision ResNet by one module; with
    `deformable`, the 3x3 ones of the last three stages by deformable convolutions."""
    for name, block in list(net.named_modules()):
        stage = name.partition(".")[0]
        for index in (1, 2, 3):
            if hasattr(block, f"bn{index}"):
                conv, norm = getattr(block, f"conv{index}"), getattr(block, f"bn{index}")
                deforms = deformable and index == 2 and stage in ("layer2", "layer3", "layer4")
                fold = DeformableNormConv2d if deforms else FrozenNormConv2d
                setattr(block, f"conv{index}", fold(conv, norm))
                setattr(block, f"bn{index}", nn.Identity())
        shortcut = getattr(block, "downsample", None)
        if shortcut is not None:
            block.downsample = FrozenNormConv2d(shortcut[0], shortcut[1])
