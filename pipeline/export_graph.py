"""A detector as one graph of standard operators, from pixels to detections.

N batch, H x W padded size, P detections of an image.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cuda_ops import standard
from model import attention, backbone
from model.config import ModelConfig
from model.postprocess import best_pairs
from pipeline.contenders import replaced
from pipeline.data.batch import MEAN, STD
from pipeline.errors import UserError
from pipeline.predict import Detector

TOP = 100
"""Detections of an image, as in COCO's evaluation; fewer where there are fewer pairs of a query
and a class."""


class PixelsToDetections(nn.Module):
    """A model with all that is around it: normalisation, the padding mask, the best pairs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([255 * x for x in MEAN])[:, None, None])
        self.register_buffer("std", torch.tensor([255 * x for x in STD])[:, None, None])

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [N, 3, H, W] uint8 RGB; sizes [N, 2] int64, (height, width) of each image, which
        begins in the top left corner. What is below and to the right of it does not count.

        Returns scores [N, P], best first, labels [N, P] int64 (class columns), and boxes [N, P, 4]
        as (x0, y0, x1, y1) in shares of the image's own width and height.
        """
        height, width = images.shape[-2:]
        below = torch.arange(height, device=images.device) >= sizes[:, :1]
        right = torch.arange(width, device=images.device) >= sizes[:, 1:]
        padding = below[:, :, None] | right[:, None]
        pixels = (images.float() - self.mean) / self.std
        outputs = self.model(pixels.masked_fill(padding[:, None], 0.0), padding)
        return best_pairs(outputs, TOP)


def check_has_graph(config: ModelConfig) -> None:
    """Raises `UserError` for a Faster R-CNN."""
    if config.architecture == "faster_rcnn":
        raise UserError(
            "--format: a faster_rcnn has no graph of fixed shapes (its proposals are as many as "
            "survive suppression); expected a Deformable DETR or a DETR, or --format safetensors"
        )


def exported(detector: Detector) -> ExportedProgram:
    """`PixelsToDetections` of any batch size, and of any height and width from `smallest_side` on.

    Raises `UserError` as `check_has_graph` does.
    """
    config = detector.config.model
    check_has_graph(config)
    # The archive holds weights that lie in memory in the order of their axes.
    model = copy.deepcopy(detector.model).to(memory_format=torch.contiguous_format)
    side = smallest_side(config)
    images = torch.zeros(2, 3, side + 32, side + 64, dtype=torch.uint8)
    sizes = torch.tensor([[side + 32, side + 64], [side, side]])
    with torch.no_grad(), standard_operators():
        return torch.export.export(
            PixelsToDetections(model).eval(),
            (images, sizes),
            dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),
            # A guard would name a bound on sums of quotients of sizes, which no `Dim` can say.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@contextmanager
def standard_operators() -> Iterator[None]:
    """Our models call no operator of this repository's, for a while."""
    with (
        replaced(attention, "fused_deformable_attention", standard.fused_deformable_attention),
        replaced(backbone, "modulated_deform_conv2d", standard.modulated_deform_conv2d),
        replaced(torch.nn.functional, "interpolate", standard.nearest),
    ):
        yield


def smallest_side(config: ModelConfig) -> int:
    """Height and width from which on an exported graph takes images.

    A map of a single cell is another graph to torch, and in two-stage the finest map must have a
    token for each query.
    """
    strides = [8, 16, 16 if config.dilation else 32]
    strides = strides[-1:] if config.num_levels == 1 else strides
    strides += [strides[-1] * 2**extra for extra in range(1, config.num_levels - len(strides) + 1)]
    side = strides[-1] + 1
    if config.two_stage:
        side = max(side, strides[0] * math.ceil(math.sqrt(config.num_queries)))
    return side
