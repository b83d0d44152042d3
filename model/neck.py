"""The neck: backbone maps to L maps of one width (paper A.2), and what may join them (Table 2).

N batch, L levels, C model width, (H_l, W_l) cells of level l, the finest first.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from model.config import ModelConfig
from model.precision import FullPrecisionGroupNorm


class HalvingConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # On CPUs with AMX torch 2.14 leaves parts of such a product in bfloat16 unwritten where it
        # is one cell wide and higher.
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[-1] <= 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


class Neck(nn.Module):
    """A 1x1 convolution for each backbone map, then 3x3 stride-2 ones for the coarser levels.

    The first extra level reads the backbone's last map, the next ones read the level before them.
    Every level ends in a group norm of 32 groups. [N, c_l, H_l, W_l] to [N, C, H_l, W_l].
    """

    def __init__(self, channels: list[int], num_levels: int, hidden_dim: int) -> None:
        super().__init__()
        extra = [channels[-1]] + [hidden_dim] * num_levels
        convolutions = [nn.Conv2d(width, hidden_dim, 1) for width in channels]
        convolutions += [
            HalvingConv2d(width, hidden_dim) for width in extra[: num_levels - len(channels)]
        ]
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, FullPrecisionGroupNorm(32, hidden_dim))
            for convolution in convolutions
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = [level(x) for level, x in zip(self.levels, features, strict=False)]
        x = features[-1]
        for level in self.levels[len(features) :]:
            x = level(x)
            maps.append(x)
        return maps


class FPN(nn.Module):
    """Feature pyramid network (arXiv:1612.03144), torchvision's: a lateral 1x1 convolution for
    each map, the coarser sum added to the finer, and a 3x3 convolution on each sum."""

    def __init__(self, num_levels: int, hidden_dim: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork([hidden_dim] * num_levels, hidden_dim)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return list(self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(maps))).values())


class BiFPN(nn.Module):
    """One bidirectional pyramid with learned fusion (EfficientDet, arXiv:1911.09070, section 3).

    From coarse to fine, then back; each node is a weighted mean of its inputs (fast normalised
    fusion), swish, and a depthwise-separable 3x3 convolution with a group norm.
    """

    def __init__(self, num_levels: int, hidden_dim: int) -> None:
        super().__init__()
        inner = num_levels - 2  # levels that a map reaches on both ways
        self.down = nn.ModuleList(_Fusion(2, hidden_dim) for _ in range(inner + 1))
        self.up = nn.ModuleList(
            _Fusion(3 if level < inner else 2, hidden_dim) for level in range(inner + 1)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """L maps [N, C, H_l, W_l], each half as large as the one before, rounded up, as stride 2
        leaves them; the same shapes."""
        middle = [maps[-1]]
        for x, fuse in zip(reversed(maps[:-1]), self.down, strict=True):
            middle.insert(0, fuse(x, F.interpolate(middle[0], size=x.shape[-2:])))
        outputs = [middle[0]]
        last = len(maps) - 1
        for level, fuse in enumerate(self.up, start=1):
            finer = F.max_pool2d(outputs[-1], 3, stride=2, padding=1)
            inputs = [maps[level], finer] if level == last else [maps[level], middle[level], finer]
            outputs.append(fuse(*inputs))
        return outputs


class _Fusion(nn.Module):
    """A node of the BiFPN: inputs of one shape [N, C, H, W] to one map of it."""

    def __init__(self, inputs: int, hidden_dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(
            hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, bias=False
        )
        self.pointwise = nn.Conv2d(hidden_dim, hidden_dim, 1, bias=False)
        self.norm = FullPrecisionGroupNorm(32, hidden_dim)

    def forward(self, *inputs: Tensor) -> Tensor:
        weights = self.weights.relu()
        weights = weights / (weights.sum() + 1e-4)
        mean = sum(weight * x for weight, x in zip(weights, inputs, strict=True))
        assert isinstance(mean, Tensor)
        return self.norm(self.pointwise(self.depthwise(F.silu(mean))))


def build_neck(config: ModelConfig, channels: list[int]) -> nn.Module:
    """The neck that `config` names, for backbone maps of `channels` channels."""
    levels, width = config.num_levels, config.hidden_dim
    plain = Neck(channels, levels, width)
    if config.neck == "plain":
        return plain
    return nn.Sequential(plain, (FPN if config.neck == "fpn" else BiFPN)(levels, width))
