"""The neck: backbone maps to L maps of one width (paper A.2)."""

from torch import Tensor, nn

from model.precision import FullPrecisionGroupNorm


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
            nn.Conv2d(width, hidden_dim, 3, stride=2, padding=1)
            for width in extra[: num_levels - len(channels)]
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
