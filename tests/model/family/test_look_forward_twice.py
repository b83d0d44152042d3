"""Look forward twice: which layers a loss trains."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig
from model.detr import build_model

Config = Callable[..., ModelConfig]
Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]


def test_looking_forward_twice_a_loss_trains_the_layer_before_and_none_further(
    small_config: Config, batch: Batch
) -> None:
    """H-Deformable-DETR's code and DINO's: references are detached before each correction."""
    torch.manual_seed(0)
    changes = {"two_stage": True, "look_forward_twice": True, "decoder_layers": 4}
    model = build_model(small_config(**changes)).double()
    for parameter in model.heads.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, padding, _ = batch
    outputs = model(images, padding)
    plain = build_model(small_config(two_stage=True, decoder_layers=4)).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs["pred_boxes"], plain(images, padding)["pred_boxes"])
    outputs["pred_boxes"].sum().backward()
    reached = [head.output.bias.grad is not None for head in model.heads.boxes]
    assert reached == [False, False, True, True, False]
