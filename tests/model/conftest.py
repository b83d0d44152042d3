"""A detector small enough to run in milliseconds, and a batch for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig

Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    def make(**changes: Any) -> ModelConfig:
        values: dict[str, Any] = {
            "num_classes": 5,
            "num_queries": 9,
            "backbone": "tiny",
            "hidden_dim": 64,
            "num_heads": 2,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "feedforward_dim": 96,
            "dropout": 0.0,
            "proposal_scale": 0.1,
        }
        return ModelConfig(**(values | changes))

    return make


@pytest.fixture
def batch() -> Batch:
    """Two images padded to 96 x 128, the second 64 x 96, with three boxes and one."""
    torch.manual_seed(7)
    images = torch.randn(2, 3, 96, 128)
    padding = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding[1, 64:], padding[1, :, 96:] = True, True
    images[1] *= ~padding[1]
    targets = [
        {
            "labels": torch.tensor([0, 3, 3]),
            "boxes": torch.tensor(
                [[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.5, 0.6], [0.8, 0.2, 0.1, 0.3]]
            ),
        },
        {"labels": torch.tensor([4]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 0.8]])},
    ]
    return images, padding, targets
