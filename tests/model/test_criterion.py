from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from model.config import ModelConfig
from model.criterion import build_criterion, count_boxes


def straightforward(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], config: ModelConfig
) -> dict[str, Tensor]:
    """One layer's losses, image by image, from torchvision's and scipy's own functions."""
    count = max(sum(len(t["labels"]) for t in targets), 1)
    sums = [torch.zeros((), dtype=boxes.dtype) for _ in range(3)]
    for x, b, target in zip(logits, boxes, targets, strict=True):
        labels, truth = target["labels"], target["boxes"]
        p = x.sigmoid()
        focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        giou = generalized_box_iou(
            box_convert(b, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        cost = (
            config.class_cost * focal[:, labels]
            + config.bbox_cost * torch.cdist(b, truth, p=1)
            - config.giou_cost * giou
        )
        query, index = linear_sum_assignment(cost.detach().numpy())
        wanted = torch.zeros_like(x)
        wanted[query, labels[index]] = 1
        sums[0] = sums[0] + sigmoid_focal_loss(x, wanted, alpha=config.focal_alpha, reduction="sum")
        sums[1] = sums[1] + (b[query] - truth[index]).abs().sum()
        sums[2] = sums[2] + (1 - giou[query, index]).sum()
    return dict(zip(("loss_ce", "loss_bbox", "loss_giou"), (s / count for s in sums), strict=True))


def outputs_of(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[dict, list]:
    torch.manual_seed(11)

    def prediction(queries: int) -> dict[str, Tensor]:
        return {
            "pred_logits": torch.randn(len(counts), queries, 5, dtype=dtype).requires_grad_(),
            "pred_boxes": torch.rand(len(counts), queries, 4, dtype=dtype).requires_grad_(),
        }

    outputs: dict[str, Any] = prediction(8)
    outputs["aux_outputs"] = [prediction(8) for _ in range(2)]
    outputs["enc_outputs"] = prediction(20)
    targets = [
        {
            "labels": torch.randint(0, 5, (n,)),
            "boxes": 0.1 + 0.4 * torch.rand(n, 4, dtype=torch.float64),
        }
        for n in counts
    ]
    return outputs, targets


def every_layer(outputs: dict) -> dict[str, dict[str, Tensor]]:
    return {
        "": outputs,
        "_0": outputs["aux_outputs"][0],
        "_1": outputs["aux_outputs"][1],
        "_enc": outputs["enc_outputs"],
    }


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_agrees_with_a_straightforward_implementation(alpha: float) -> None:
    config = ModelConfig(num_classes=5, focal_alpha=alpha, bbox_weight=3.0, giou_cost=1.0)
    outputs, targets = outputs_of([3, 0, 5])
    losses = build_criterion(config)(outputs, targets)
    weights = {"loss_ce": 2.0, "loss_bbox": 3.0, "loss_giou": 2.0}
    total = torch.zeros((), dtype=torch.float64)
    for suffix, layer in every_layer(outputs).items():
        binary = [t | {"labels": t["labels"] * 0} for t in targets]
        expected = straightforward(
            layer["pred_logits"],
            layer["pred_boxes"],
            binary if suffix == "_enc" else targets,
            config,
        )
        for name, value in expected.items():
            torch.testing.assert_close(losses[name + suffix], value, rtol=1e-10, atol=0)
            total = total + weights[name] * value
    torch.testing.assert_close(losses["loss"], total, rtol=1e-10, atol=0)
    assert len(losses) == 13

    leaves = [x for layer in every_layer(outputs).values() for x in list(layer.values())[:2]]
    ours = torch.autograd.grad(losses["loss"], leaves)
    theirs = torch.autograd.grad(total, leaves)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_one_query_one_box_by_hand() -> None:
    logits = torch.tensor([[[0.0, -50.0]]], dtype=torch.float64)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]], dtype=torch.float64)
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
    config = ModelConfig(num_classes=2)
    losses = build_criterion(config)({"pred_logits": logits, "pred_boxes": boxes}, [target])
    # p = 1/2: 0.25 * (1/2)^2 * log 2; boxes: width differs by 0.2, IoU 1/2 with no waste.
    assert losses["loss_ce"].item() == pytest.approx(0.0625 * 0.6931471805599453, rel=1e-12)
    assert losses["loss_bbox"].item() == pytest.approx(0.2, rel=1e-6)
    assert losses["loss_giou"].item() == pytest.approx(0.5, rel=1e-6)


def test_no_boxes_at_all_leaves_the_background_loss() -> None:
    outputs, targets = outputs_of([0, 0])
    losses = build_criterion(ModelConfig(num_classes=5))(outputs, targets)
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou_enc"] == 0
    assert losses["loss_ce"] > 0
    losses["loss"].backward()
    for layer in every_layer(outputs).values():
        assert layer["pred_logits"].grad.abs().sum() > 0
        assert layer["pred_boxes"].grad.abs().sum() == 0


def test_degenerate_boxes_give_finite_losses_and_gradients() -> None:
    outputs, targets = outputs_of([2, 2], torch.float32)
    targets[0]["boxes"][:, 2:] = 0
    with torch.no_grad():
        outputs["pred_boxes"][0, :, 2:] = 0
        outputs["pred_boxes"][0, 0] = targets[0]["boxes"][0]
    losses = build_criterion(ModelConfig(num_classes=5))(outputs, targets)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert outputs["pred_boxes"].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_outputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    outputs, targets = outputs_of([3, 1], dtype)
    losses = build_criterion(ModelConfig(num_classes=5))(outputs, targets)
    wide = {
        "pred_logits": outputs["pred_logits"].float(),
        "pred_boxes": outputs["pred_boxes"].float(),
    }
    expected = build_criterion(ModelConfig(num_classes=5))(wide, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert losses[name].dtype == torch.float32
        assert losses[name] == expected[name]


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    outputs, targets = outputs_of([3, 0, 5, 1])
    criterion = build_criterion(ModelConfig(num_classes=5))
    whole = criterion(outputs, targets)

    def part(outputs: Any, images: slice) -> Any:
        if isinstance(outputs, list):
            return [part(x, images) for x in outputs]
        if isinstance(outputs, dict):
            return {name: part(x, images) for name, x in outputs.items()}
        return outputs[images]

    count = count_boxes(targets, torch.device("cpu"))
    assert count == 9
    halves = [
        criterion(part(outputs, images), targets[images], num_boxes=count)
        for images in (slice(0, 2), slice(2, 4))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value, rtol=1e-12, atol=0)


def test_a_target_is_wanted_for_each_image() -> None:
    outputs, targets = outputs_of([1, 1])
    with pytest.raises(ValueError, match="got 1, expected one for each of 2"):
        build_criterion(ModelConfig(num_classes=5))(outputs, targets[:1])


def count_on_rank(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    boxes = [{"labels": torch.zeros(n, dtype=torch.int64)} for n in ((3, 2), (0, 0))[rank]]
    count = count_boxes(boxes, torch.device("cpu"))
    assert count.item() == 2.5, count
    torch.distributed.destroy_process_group()


def test_boxes_are_counted_over_all_processes(tmp_path: Path) -> None:
    mp.spawn(count_on_rank, args=(str(tmp_path / "store"),), nprocs=2)


def test_autocast_does_not_reach_the_loss(
    small_config: Callable[..., ModelConfig],
) -> None:
    outputs, targets = outputs_of([3, 1], torch.float32)
    criterion = build_criterion(small_config())
    outside = criterion(outputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(outputs, targets)
    for name, value in outside.items():
        assert inside[name].dtype == torch.float32
        assert inside[name] == value
