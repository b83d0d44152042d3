"""What a prediction depends on: its gradient with respect to the pixels (A.5, Figure 5)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.postprocess import class_scores
from pipeline.data.batch import STD

ITEMS = ("x", "y", "w", "h", "c")
"""Centre, width and height of a box, as fractions of the image's; the class's probability."""


class _NothingDetached(TorchFunctionMode):
    """`Tensor.detach` gives the tensor itself.

    Training cuts the gradient at the boxes that a refining decoder layer starts from (A.4). What a
    box depends on passes through them all the same.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.detach:
            return args[0]
        return func(*args, **(kwargs or {}))


def differentiable_outputs(
    model: nn.Module, images: Tensor, padding_mask: Tensor
) -> dict[str, Any]:
    """The model's outputs with their whole dependence on `images`, which must require a gradient:
    through the boxes that decoder layers hand on, too. Arguments as those of the model."""
    with torch.enable_grad(), _NothingDetached():
        return model(images, padding_mask)


def gradient_norms(outputs: dict[str, Any], images: Tensor, query: int, column: int) -> Tensor:
    """The norms [5, H, W] of the gradients of `ITEMS` of one query of the first image.

    outputs: `differentiable_outputs` of `images` [N, 3, H, W], normalised. The norm is over the
    colours of a pixel, each in units of its whole range.
    """
    items = [*outputs["pred_boxes"][0, query], class_scores(outputs)[0, query, column]]
    deviation = images.new_tensor(STD)[:, None, None]
    return torch.stack(
        [
            (torch.autograd.grad(item, images, retain_graph=True)[0][0] / deviation).norm(dim=0)
            for item in items
        ]
    )
