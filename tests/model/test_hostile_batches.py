"""Every architecture on batches that real data and bad annotations bring, and in 16 bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.postprocess import postprocess
from pipeline.recipes import RECIPES

ARCHITECTURES: dict[str, dict] = {
    "deformable": {},
    "refine": {"box_refine": True},
    "two_stage": {"two_stage": True},
    "one_to_many": {"two_stage": True, "one_to_many_queries": 20},
    "single_scale": {"num_levels": 1},
    "own_level": {"level_exchange": False, "neck": "bifpn"},
    "detr": {"architecture": "detr", "classification": "softmax", "num_levels": 1},
    "detr_focal": {"architecture": "detr", "num_levels": 1},
    "conditional": {"architecture": "conditional_detr", "num_levels": 1},
    "smca": {
        "architecture": "smca_detr",
        "classification": "focal_no_object",
        "num_levels": 1,
    },
    "dab": {"architecture": "dab_detr", "num_levels": 1, "num_patterns": 2},
    "dn_dab": {"architecture": "dab_detr", "num_levels": 1, "denoising_groups": 2},
    "dn_dab_deformable": {
        "architecture": "dab_deformable_detr",
        "box_refine": True,
        "denoising_groups": 2,
    },
    "dino": {"architecture": "dino", "two_stage": True, "denoising_pairs": 6},
    "parts_of_dino": {
        "two_stage": True,
        "mixed_query_selection": True,
        "look_forward_twice": True,
        "denoising_pairs": 6,
    },
    "anchor": {"architecture": "anchor_detr", "num_levels": 1, "num_patterns": 2},
    "sam": {
        "architecture": "sam_detr",
        "num_levels": 1,
        "box_refine": True,
        "salient_gaussians": True,
    },
    "sam_multiscale": {
        "architecture": "sam_multiscale_detr",
        "num_levels": 3,
        "box_refine": True,
    },
    "faster_rcnn": {
        "architecture": "faster_rcnn",
        "classification": "softmax",
        "anchor_cells": 4,
        "sampled_proposals": 64,
    },
}
NONE = torch.zeros(0, 4)
LARGE = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.4, 0.6, 0.5, 0.3]])
FLAT = torch.tensor(
    [
        [0.5, 0.5, 0.0, 0.4],  # a line
        [0.2, 0.3, 0.0, 0.0],  # a point
        [0.0, 0.0, 0.0, 0.0],  # a point in the corner
        [0.7, 0.7, 1e-8, 1e-8],
        [0.5, 0.5, 1.0, 1e-6],
        [0.5, 0.5, 0.4, 0.4],
    ]
)
generator = torch.Generator().manual_seed(0)
MANY = 0.1 + 0.8 * torch.rand(1000, 4, generator=generator)
MANY[:, 2:] *= 0.2

# Padded (height, width), valid (height, width) of the second image, boxes of both.
BATCHES: dict[str, tuple[tuple[int, int], tuple[int, int], Tensor, Tensor]] = {
    "no_ground_truth": ((64, 96), (48, 96), NONE, NONE),
    "one_image_without_boxes": ((64, 96), (48, 96), NONE, LARGE),
    "degenerate_boxes": ((64, 96), (48, 96), FLAT, LARGE),
    "a_thousand_boxes": ((64, 96), (48, 96), MANY, LARGE),
    "one_pixel_beside_an_image": ((64, 96), (1, 1), LARGE, LARGE),
    "one_pixel_alone": ((1, 1), (1, 1), LARGE, NONE),
    "one_row": ((1, 300), (1, 200), LARGE, LARGE),
}


def make(name: str) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    (height, width), (valid_height, valid_width), *boxes = BATCHES[name]
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, valid_height:], padding[1, :, valid_width:] = True, True
    images = images.masked_fill(padding[:, None], 0.0)
    return images, padding, [{"labels": 1 + torch.arange(len(b)) % 4, "boxes": b} for b in boxes]


def told(config: ModelConfig, targets: list[dict[str, Tensor]]) -> tuple:
    """What a model wants to know besides the images in training."""
    return (targets,) if config.wants_targets else ()


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_and_an_evaluation(
    architecture: str, batch_name: str, small_config: Callable[..., ModelConfig]
) -> None:
    torch.manual_seed(0)
    config = small_config(**ARCHITECTURES[architecture])
    model, criterion = build_model(config).train(), build_criterion(config)
    images, padding, targets = make(batch_name)
    losses = criterion(model(images, padding, *told(config, targets)), targets)
    for name, value in losses.items():
        assert value.isfinite(), name
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        results = postprocess(model.eval()(images, padding), torch.tensor([[480, 640], [1, 1]]))
    assert len(results) == 2
    for result in results:
        assert result["scores"].isfinite().all()
        assert result["boxes"].isfinite().all()
        assert len(result["scores"]) == len(result["labels"]) == len(result["boxes"]) <= 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_weights_are_told_and_crash_nothing(
    architecture: str, small_config: Callable[..., ModelConfig]
) -> None:
    config = small_config(**ARCHITECTURES[architecture])
    model, criterion = build_model(config).train(), build_criterion(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    images, padding, targets = make("one_image_without_boxes")
    outputs = model(images, padding, *told(config, targets))
    if architecture == "faster_rcnn":  # nothing to match: the loss itself tells the trainer
        assert criterion(outputs, targets)["loss"].isnan()
    else:
        with pytest.raises(FloatingPointError, match="the matching cost is not finite"):
            criterion(outputs, targets)


def reduced(name: str) -> ModelConfig:
    """A recipe with few layers and queries, and no dropout to tell the precisions apart."""
    config = RECIPES[name]().model
    return replace(
        config,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=20,
        dropout=0.0,
        sampled_proposals=64,
    )


def check_step(config: ModelConfig, dtype: torch.dtype) -> None:
    """A step under autocast: finite gradients in float32, the loss within 2% of float32's."""
    torch.manual_seed(0)
    model, criterion = build_model(config).train(), build_criterion(config)
    with torch.no_grad():
        # Random residual branches would add up to activations that no trained backbone has.
        for name, module in model.backbone.named_modules():
            if name.endswith("conv3.norm"):
                module.weight.mul_(0.2)
    images, padding, _ = make("no_ground_truth")
    targets = [{"labels": torch.tensor([1, 3]), "boxes": LARGE} for _ in images]
    with torch.no_grad():
        torch.manual_seed(0)
        exact = criterion(model(images, padding, *told(config, targets)), targets)["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        outputs = model(images, padding, *told(config, targets))
    losses = criterion(outputs, targets)
    assert all(value.dtype == torch.float32 for value in losses.values())
    rounded = losses["loss"]
    assert abs(rounded - exact) < 0.02 * exact, (rounded.item(), exact.item())
    assert rounded != exact
    rounded.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name


# ResNet-101 and ResNeXt-101 without DCN are more of blocks that the others have, and slow.
@pytest.mark.parametrize("name", [n for n in RECIPES if "101" not in n or "dcn" in n])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    check_step(reduced(name), torch.bfloat16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float16_is_close_to_float32(
    architecture: str, small_config: Callable[..., ModelConfig]
) -> None:
    check_step(small_config(**ARCHITECTURES[architecture]), torch.float16)
