"""The set prediction loss: classification, and L1 and generalised IoU of matched pairs.

D decoder layers, N batch, Q queries, T boxes of the whole batch, P matched pairs.
"""

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from model.boxes import cxcywh_to_xyxy, generalized_iou
from model.config import ModelConfig
from model.faster_rcnn import FasterRCNNCriterion
from model.matcher import Layers, Matches, Truth, match
from model.parts import Group, Targets
from model.precision import full_precision


class Criterion(nn.Module):
    """Matches every layer's predictions to the ground truth and sums the losses of the pairs.

    Computed in float32 at the least, whatever precision the model ran in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Rounded to float32, as the published criterion keeps it, in float64 models too.
        self.no_object_weight = torch.tensor(config.no_object_weight).item()
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.bbox_weight,
            "loss_giou": config.giou_weight,
        }

    def forward(
        self, outputs: dict[str, Any], targets: Targets, num_boxes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        outputs: of the model. targets: for each image `labels` [n] int64 below `num_classes` and
        `boxes` [n, 4], normalised (cx, cy, w, h), n may be 0. num_boxes: what every loss is
        divided by, instead of `count_boxes(targets)`; give it to spread a batch over several
        calls (a batch without any box counts as one with one). Returns unweighted `loss_ce`,
        `loss_bbox`, `loss_giou` of the last layer, with `_0`, ... of the layers before, `_enc` of
        the first stage and `_NAME` of each group of queries of training alone, and `loss`, the
        weighted sum of them all. The labels of a first stage that does not tell classes apart are
        all 0. Raises ValueError if there is not one target for each image, FloatingPointError if
        predictions are NaN.
        """
        last = full_precision(outputs["pred_boxes"])
        if len(targets) != len(last):
            raise ValueError(f"targets: got {len(targets)}, expected one for each of {len(last)}")
        truth = gather_truth(targets, last)
        if num_boxes is None:
            boxes = count_boxes(targets, last.device).to(last)
            num_boxes = boxes.clamp(min=1)
        else:
            boxes = num_boxes = num_boxes.to(last)
        groups = _layer_groups(outputs, truth, self.config)
        losses: dict[str, Tensor] = {}
        total = last.new_zeros(())
        for group, matches in zip(groups, match(groups, truth, self.config), strict=True):
            # A batch without boxes counts as one with one, repeated or not.
            wanted = torch.maximum(boxes * group.repeats, num_boxes)
            normalizers = {
                "loss_ce": self._class_normalizer(group, boxes, wanted),
                "loss_bbox": wanted,
                "loss_giou": wanted,
            }
            for name, values in self._losses(group, matches, truth).items():
                values = values / normalizers[name]
                total = total + self.weights[name] * values.sum()
                for suffix, value in zip(group.names, values.unbind(), strict=True):
                    losses[name + suffix] = value
        losses["loss"] = total
        return losses

    def _losses(self, group: Layers, matches: Matches, truth: Truth) -> dict[str, Tensor]:
        """The three losses, summed over each layer: [D] each."""
        layers = len(group.names)
        layer, query, target = matches
        image = truth.image[target]
        boxes, wanted = group.boxes[layer, image, query], truth.boxes[target]
        overlap = generalized_iou(
            cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted), self.config.area_eps
        )

        # Every query counts as one without an object, then the matched ones are corrected.
        logits = full_precision(group.logits)
        labels = group.labels[target]
        softmax = self.config.classification == "softmax"
        background, correction = (self._softmax_losses if softmax else self._focal_losses)(
            logits, (layer, image, query), labels
        )
        if group.counted is not None:
            background = background.masked_fill(~group.counted[..., None], 0.0)
        return {
            "loss_ce": background.flatten(1).sum(1) + correction.view(layers, -1).sum(1),
            "loss_bbox": (boxes - wanted).abs().view(layers, -1).sum(1),
            "loss_giou": (1 - overlap).view(layers, -1).sum(1),
        }

    def _focal_losses(
        self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of logits [D, N, Q, classes] without objects, and what each matched pair [P] adds."""
        alpha = self.config.focal_alpha
        matched = logits[*pairs, labels]
        correction = alpha * _focal_term(-matched) - (1 - alpha) * _focal_term(matched)
        return (1 - alpha) * _focal_term(logits), correction

    def _softmax_losses(
        self, logits: Tensor, pairs: tuple[Tensor, Tensor, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_focal_losses`, of DETR's cross entropy; its last class is no object."""
        background = self.no_object_weight * -logits.log_softmax(-1)[..., -1]
        matched = -logits[pairs].log_softmax(-1)
        given = matched.gather(1, labels[:, None])[:, 0]
        return background, given - self.no_object_weight * matched[:, -1]

    def _class_normalizer(self, group: Layers, boxes: Tensor, num_boxes: Tensor) -> Tensor:
        """The number of boxes, or for softmax the sum of the queries' weights."""
        if self.config.classification != "softmax":
            return num_boxes
        weight = self.no_object_weight
        _, images, queries, _ = group.logits.shape
        return weight * images * queries + (1 - weight) * boxes


def build_criterion(config: ModelConfig) -> nn.Module:
    """The loss that trains `build_model(config)`."""
    faster_rcnn = config.architecture == "faster_rcnn"
    return FasterRCNNCriterion(config) if faster_rcnn else Criterion(config)


def count_boxes(targets: Targets, device: torch.device) -> Tensor:
    """Mean number of boxes in a process's batch, over all processes; a scalar."""
    total = sum(len(target["labels"]) for target in targets)
    count = torch.full((), total, dtype=torch.float32, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count


def gather_truth(targets: Targets, like: Tensor) -> Truth:
    """Join the images' targets, with boxes in the precision and on the device of `like`."""
    counts = [len(target["labels"]) for target in targets]
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Truth(
        image=image.to(like.device, non_blocking=True),
        labels=torch.cat([target["labels"] for target in targets]).to(like.device),
        boxes=torch.cat([target["boxes"] for target in targets]).to(like),
        counts=counts,
    )


def _layer_groups(outputs: dict[str, Any], truth: Truth, config: ModelConfig) -> list[Layers]:
    groups = [_layers(outputs, truth)]
    if "enc_outputs" in outputs:
        first = outputs["enc_outputs"]
        groups.append(
            Layers(
                names=["_enc"],
                logits=first["pred_logits"][None],
                boxes=full_precision(first["pred_boxes"])[None],
                labels=truth.labels * config.proposes_classes,
            )
        )
    return groups + [_layers(x, truth, x["group"]) for x in outputs.get("groups", [])]


def _layers(outputs: dict[str, Any], truth: Truth, group: Group | None = None) -> Layers:
    """All decoder layers of the queries that detect, or of a group."""
    earlier = outputs.get("aux_outputs", [])
    layers = [*earlier, outputs]
    ending = f"_{group.name}" if group else ""
    return Layers(
        names=[f"_{index}{ending}" for index in range(len(earlier))] + [ending],
        logits=torch.stack([layer["pred_logits"] for layer in layers]),
        boxes=full_precision(torch.stack([layer["pred_boxes"] for layer in layers])),
        labels=truth.labels,
        known=group.known if group else None,
        counted=group.counted if group else None,
        repeats=group.repeats if group else 1,
    )


def _focal_term(logits: Tensor) -> Tensor:
    """Focal loss, gamma = 2, before alpha: of an absent class at x, of a present one at -x."""
    return logits.sigmoid().square() * F.softplus(logits, threshold=40.0)
