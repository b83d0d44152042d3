"""A detector of ours and the same one of transformers on the same images, forward and backward."""

from typing import Any

import torch
from torch import Tensor, nn

# Places of cells are float32 in ours, as the published models have them, and float64 in theirs.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def with_random_weights(theirs: nn.Module) -> nn.Module:
    """Their model in float64, all of it trained, no parameter at 0 and no layer saturated."""
    theirs.double().requires_grad_(True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "backbone" not in name:
                scale = 0.3 if name.endswith("bias") else 1.5 * parameter.shape[-1] ** -0.5
                parameter.normal_(0, scale if parameter.dim() < 4 else 0.02)
        for name, buffer in theirs.named_buffers():
            if "running_var" in name or name.endswith("normalization.weight"):
                buffer.uniform_(0.6, 1.2)
    return theirs


def assert_same_outputs(
    ours: nn.Module, theirs: nn.Module
) -> tuple[dict[str, Any], Any, dict[str, Tensor]]:
    """Ours, theirs, and the gradients of one loss of both; those of theirs by their names, 0 where
    there is none."""
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, 45:], padding[1, :, 71:] = True, True
    images[1] *= ~padding[1]
    found = ours.train()(images, padding)
    expected = theirs.train()(pixel_values=images, pixel_mask=(~padding).long())
    torch.testing.assert_close(found["pred_logits"], expected.logits, **CLOSE)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, **CLOSE)

    (found["pred_boxes"].square().sum() + found["pred_logits"].sin().sum()).backward()
    (expected.pred_boxes.square().sum() + expected.logits.sin().sum()).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in theirs.named_parameters(remove_duplicate=False)
    }
    return found, expected, gradients


def assert_close_gradient(found: Tensor, wanted: Tensor, name: str) -> None:
    """Of one tensor, as a part of its largest number."""
    assert wanted.abs().max() > 0, name
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-4, name
