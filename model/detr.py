"""The one way to a detector."""

from collections.abc import Callable

from torch import nn

from model.config import Architecture, ModelConfig
from model.deformable_detr import DeformableDETR
from model.dense_detr import DenseDETR
from model.family.anchor import AnchorDETR
from model.family.conditional import ConditionalDETR
from model.family.dab import DABDETR
from model.family.dab_deformable import DABDeformableDETR
from model.family.dino import DINO
from model.family.sam import SamDETR, SamMultiScaleDETR
from model.family.smca import SMCADETR
from model.faster_rcnn import FasterRCNN


def build_model(config: ModelConfig) -> nn.Module:
    """The detector `config` describes, with fresh weights."""
    detectors: dict[Architecture, Callable[[ModelConfig], nn.Module]] = {
        "deformable_detr": DeformableDETR,
        "detr": DenseDETR,
        "conditional_detr": ConditionalDETR,
        "smca_detr": SMCADETR,
        "faster_rcnn": FasterRCNN,
        "dab_detr": DABDETR,
        "dab_deformable_detr": DABDeformableDETR,
        "sam_detr": SamDETR,
        "sam_multiscale_detr": SamMultiScaleDETR,
        "dino": DINO,
        "anchor_detr": AnchorDETR,
    }
    return detectors[config.architecture](config)
