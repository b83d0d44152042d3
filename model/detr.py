"""The one way to a detector."""

from torch import nn

from model.config import ModelConfig
from model.deformable_detr import DeformableDETR
from model.dense_detr import DenseDETR


def build_model(config: ModelConfig) -> nn.Module:
    """The detector `config` describes, with fresh weights."""
    return DenseDETR(config) if config.architecture == "detr" else DeformableDETR(config)
