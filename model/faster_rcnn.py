"""Faster R-CNN with a feature pyramid (arXiv:1506.01497, 1612.03144), the baseline of Table 1.

torchvision's components with its published thresholds, under the contract of the other detectors.
N batch, A anchors of an image, P boxes of the whole batch, C class columns, the first of them for
the background.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from model.backbone import build_backbone
from model.boxes import cxcywh_to_xyxy
from model.config import ModelConfig
from model.geometry import valid_sizes
from model.official_names import faster_rcnn_names
from model.precision import full_precision, without_autocast

# Images are padded to a multiple of the coarsest backbone stride, so that every stride is exact.
STRIDE = 32
LEVEL_STRIDES = (4, 8, 16, 32, 64)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
POOLED_SIDE = 7


class FasterRCNN(nn.Module):
    """torchvision's `fasterrcnn_resnet50_fpn` without its transform, on any of our backbones.

    The losses of the second stage are on boxes that are drawn with the ground truth at hand, so the
    forward gives that stage too, as a function for the criterion to call.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_dim, config.feedforward_dim
        self.backbone = build_backbone(config)
        self.fpn = FeaturePyramidNetwork(
            self.backbone.pyramid_channels, width, extra_blocks=LastLevelMaxPool()
        )
        self.rpn = proposal_network(config, RPNHead(width, len(ASPECT_RATIOS)))
        self.roi_heads = box_heads(
            config.sampled_proposals,
            pool=MultiScaleRoIAlign(["0", "1", "2", "3"], POOLED_SIDE, sampling_ratio=2),
            head=TwoMLPHead(width * POOLED_SIDE**2, hidden),
            predictor=FastRCNNPredictor(hidden, config.num_classes),
        )

    def official_names(self, key: str) -> list[str]:
        """The published name of one of our keys."""
        return faster_rcnn_names(key)

    def forward(self, images: Tensor, padding_mask: Tensor) -> dict[str, Any]:
        """Both stages on a padded batch; arguments as `SetDetector.forward`.

        Returns `objectness` [N A, 1], `anchor_deltas` [N A, 4], `anchors` (for each image [A, 4]),
        `proposals` (for each image [n, 4], absolute (x0, y0, x1, y1), best first), `image_sizes`
        (valid (height, width) of each) and `second_stage`: boxes such as `proposals` to class
        logits [P, C] and box deltas [P, 4 C]. In evaluation also those of the proposals, as
        `class_logits` and `box_deltas`.
        """
        sizes = [(h, w) for w, h in valid_sizes([padding_mask])[:, 0].tolist()]
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        maps = self.backbone.pyramid(images.to(self.rpn.head.cls_logits.weight.dtype))
        named = OrderedDict((str(level), x) for level, x in enumerate(maps))
        pyramid = list(self.fpn(named).values())

        per_level = self.rpn.head(pyramid)
        cells = [x[0].numel() for x in per_level[0]]
        objectness, deltas = map(full_precision, concat_box_prediction_layers(*per_level))
        grids = [deltas.new_empty(x.shape[-2:]) for x in pyramid]  # anchors in full precision
        anchors = self.rpn.anchor_generator(ImageList(images, sizes), grids)
        decoded = self.rpn.box_coder.decode(deltas.detach(), anchors).view(len(images), -1, 4)
        proposals, _ = self.rpn.filter_proposals(decoded, objectness, sizes, cells)

        padded_size = (images.shape[-2], images.shape[-1])
        second_stage = partial(self._second_stage, pyramid, padded_size, _autocast_dtype(images))
        outputs = {
            "objectness": objectness,
            "anchor_deltas": deltas,
            "anchors": anchors,
            "proposals": proposals,
            "image_sizes": sizes,
            "second_stage": second_stage,
        }
        if not self.training:
            outputs["class_logits"], outputs["box_deltas"] = second_stage(proposals)
        return outputs

    def _second_stage(
        self,
        pyramid: list[Tensor],
        padded_size: tuple[int, int],
        dtype: torch.dtype | None,
        boxes: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Class logits [P, C] and box deltas [P, 4 C], in the forward's autocast dtype."""
        with without_autocast(pyramid[0]):
            maps = {str(level): full_precision(x) for level, x in enumerate(pyramid)}
            pooled = self.roi_heads.box_roi_pool(maps, boxes, [padded_size])
        with torch.autocast(pooled.device.type, dtype=dtype, enabled=dtype is not None):
            features = self.roi_heads.box_head(pooled.to(self.roi_heads.box_head.fc6.weight.dtype))
            logits, deltas = self.roi_heads.box_predictor(features)
        return full_precision(logits), full_precision(deltas)


class FasterRCNNCriterion(nn.Module):
    """torchvision's losses of both stages, on a random choice of anchors and of proposals."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.first, self.second = proposal_network(config), box_heads(config.sampled_proposals)

    def forward(
        self,
        outputs: dict[str, Any],
        targets: list[dict[str, Tensor]],
        num_boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        outputs: of the model. targets: as `Criterion.forward`, with labels from 1 on; boxes without
        area are left out. num_boxes: not used, the means are over the chosen anchors and proposals.
        Returns torchvision's `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`,
        `loss_box_reg`, and `loss`, their sum. Draws from PyTorch's generator. Raises ValueError if
        there is not one target for each image, or for a label that is not in 1..C-1.
        """
        anchors = outputs["anchors"]
        if len(targets) != len(anchors):
            raise ValueError(
                f"targets: got {len(targets)}, expected one for each of {len(anchors)}"
            )
        truth = [
            self._absolute(target, size, anchors[0])
            for target, size in zip(targets, outputs["image_sizes"], strict=True)
        ]
        with without_autocast(outputs["objectness"]):
            labels, matched = self.first.assign_targets_to_anchors(anchors, truth)
            objectness, anchor_boxes = self.first.compute_loss(
                outputs["objectness"],
                outputs["anchor_deltas"],
                labels,
                self.first.box_coder.encode(matched, anchors),
            )
            chosen, _, labels, wanted = self.second.select_training_samples(
                list(outputs["proposals"]), truth
            )
            logits, deltas = outputs["second_stage"](chosen)
            if len(logits):
                classes, boxes = fastrcnn_loss(logits, deltas, labels, wanted)
            else:  # no proposal and no object in the whole batch
                classes, boxes = logits.sum(), deltas.sum()
        return {
            "loss_objectness": objectness,
            "loss_rpn_box_reg": anchor_boxes,
            "loss_classifier": classes,
            "loss_box_reg": boxes,
            "loss": objectness + anchor_boxes + classes + boxes,
        }

    def _absolute(
        self, target: dict[str, Tensor], size: tuple[int, int], like: Tensor
    ) -> dict[str, Tensor]:
        labels = target["labels"].to(like.device)
        wrong = labels[(labels < 1) | (labels >= self.num_classes)].tolist()
        if wrong:
            raise ValueError(
                f"labels: got {wrong[0]}, expected 1..{self.num_classes - 1}: column 0 of a "
                f"Faster R-CNN is the background"
            )
        height, width = size
        scale = like.new_tensor((width, height, width, height))
        boxes = cxcywh_to_xyxy(target["boxes"].to(like)) * scale
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        return {"labels": labels[~empty], "boxes": boxes[~empty]}


@torch.no_grad()
def detections(outputs: dict[str, Any], sizes: Tensor, top: int) -> list[dict[str, Tensor]]:
    """As `postprocess`, which see, with torchvision's thresholds and suppression for each class.

    Boxes are clipped to the image, and only those that score above 0.05 are given.
    """
    if "class_logits" not in outputs:
        raise ValueError("outputs: got those of training, expected a model in evaluation mode")
    images = outputs["image_sizes"]
    if tuple(sizes.shape) != (len(images), 2):
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}, expected ({len(images)}, 2)")
    found = box_heads(top=top).postprocess_detections(
        outputs["class_logits"], outputs["box_deltas"], outputs["proposals"], images
    )
    results = []
    for boxes, scores, labels, (height, width), wanted in zip(
        *found, images, sizes.tolist(), strict=True
    ):
        y, x = wanted[0] / height, wanted[1] / width
        results.append(
            {"scores": scores, "labels": labels, "boxes": boxes * boxes.new_tensor((x, y, x, y))}
        )
    return results


def proposal_network(config: ModelConfig, head: nn.Module | None = None) -> RegionProposalNetwork:
    """torchvision's first stage; without a head, to match and to sample only."""
    return RegionProposalNetwork(
        AnchorGenerator(
            tuple((config.anchor_cells * stride,) for stride in LEVEL_STRIDES),
            (ASPECT_RATIOS,) * len(LEVEL_STRIDES),
        ),
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def box_heads(
    samples: int = 512,
    top: int = 100,
    pool: nn.Module | None = None,
    head: nn.Module | None = None,
    predictor: nn.Module | None = None,
) -> RoIHeads:
    """torchvision's second stage; without modules, to match, to sample and to suppress only."""
    return RoIHeads(
        pool,
        head,
        predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=samples,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=top,
    )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
