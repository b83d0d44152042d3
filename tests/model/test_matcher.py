from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy
from model.config import ModelConfig
from model.criterion import gather_truth
from model.matcher import Layers, match, matching_cost


def problem(counts: list[int], queries: int, layers: int = 2) -> tuple[Layers, list[dict]]:
    targets = [
        {"labels": torch.randint(0, 5, (n,)), "boxes": 0.1 + 0.4 * torch.rand(n, 4)} for n in counts
    ]
    group = Layers(
        names=[str(layer) for layer in range(layers)],
        logits=torch.randn(layers, len(counts), queries, 5),
        boxes=torch.rand(layers, len(counts), queries, 4),
        labels=torch.cat([target["labels"] for target in targets]),
    )
    return group, targets


def plain_cost(logits: Tensor, boxes: Tensor, label: int, box: Tensor) -> float:
    """One query against one box, written out number by number."""
    p = 1 / (1 + torch.exp(-logits[label]))
    present = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8)
    absent = 0.75 * p**2 * -torch.log(1 - p + 1e-8)
    a, b = cxcywh_to_xyxy(boxes).tolist(), cxcywh_to_xyxy(box).tolist()
    sides = [
        (max(a[i], b[i]), min(a[i + 2], b[i + 2]), min(a[i], b[i]), max(a[i + 2], b[i + 2]))
        for i in (0, 1)
    ]
    inter = max(0, sides[0][1] - sides[0][0]) * max(0, sides[1][1] - sides[1][0])
    hull = (sides[0][3] - sides[0][2]) * (sides[1][3] - sides[1][2])
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter
    giou = inter / union - (hull - union) / hull
    return float(2 * (present - absent) + 5 * (boxes - box).abs().sum() - 2 * giou)


def test_costs_by_hand() -> None:
    torch.manual_seed(1)
    group, targets = problem([2, 3], queries=4)
    truth = gather_truth(targets, group.boxes)
    cost = matching_cost(group, truth, ModelConfig())
    assert cost.shape == (5, 2, 4)
    for t, image in enumerate([0, 0, 1, 1, 1]):
        for layer in range(2):
            for q in range(4):
                expected = plain_cost(
                    group.logits[layer, image, q],
                    group.boxes[layer, image, q],
                    int(truth.labels[t]),
                    truth.boxes[t],
                )
                assert cost[t, layer, q].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_assignment_is_cheaper(seed: int) -> None:
    torch.manual_seed(seed)
    group, targets = problem([3, 0, 2, 4], queries=5)
    truth = gather_truth(targets, group.boxes)
    config = ModelConfig()
    cost = matching_cost(group, truth, config)
    (matches,) = match([group], truth, config)
    assert matches.layer.tolist() == [0] * 9 + [1] * 9
    for layer in range(2):
        chosen = matches.layer == layer
        query, target = matches.query[chosen], matches.target[chosen]
        assert sorted(target.tolist()) == list(range(9))
        for image, box_range in ((0, range(3)), (2, range(3, 5)), (3, range(5, 9))):
            mine = truth.image[target] == image
            found = cost[target[mine], layer, query[mine]].sum()
            assert len(set(query[mine].tolist())) == len(box_range)
            best = min(
                sum(cost[t, layer, q] for t, q in zip(box_range, order, strict=True))
                for order in permutations(range(5), len(box_range))
            )
            torch.testing.assert_close(found, best)


def test_more_boxes_than_queries() -> None:
    group, targets = problem([1000, 1], queries=6)
    (matches,) = match([group], gather_truth(targets, group.boxes), ModelConfig())
    assert len(matches.query) == 2 * (6 + 1)
    first = (matches.layer == 0) & (matches.target < 1000)
    assert sorted(matches.query[first].tolist()) == list(range(6))


def test_no_boxes_at_all() -> None:
    group, targets = problem([0, 0], queries=6)
    (matches,) = match([group], gather_truth(targets, group.boxes), ModelConfig())
    assert [x.numel() for x in matches] == [0, 0, 0]
    assert matches.query.dtype == torch.int64


def test_groups_share_one_call() -> None:
    torch.manual_seed(3)
    group, targets = problem([3, 2], queries=5)
    truth = gather_truth(targets, group.boxes)
    other = Layers(["_enc"], torch.randn(1, 2, 20, 5), torch.rand(1, 2, 20, 4), truth.labels * 0)
    together = match([group, other], truth, ModelConfig())
    for matches, alone in zip(together, [group, other], strict=True):
        (expected,) = match([alone], truth, ModelConfig())
        for got, wanted in zip(matches, expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_not_a_number_is_named(where: str) -> None:
    group, targets = problem([2, 1], queries=4)
    getattr(group, where)[1, 0, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"pred_{where}1 \({5 if where[0] == 'l' else 4}"):
        match([group], gather_truth(targets, group.boxes), ModelConfig())


def test_degenerate_boxes_are_matched(small_config: Callable[..., ModelConfig]) -> None:
    group, targets = problem([2], queries=4)
    targets[0]["boxes"][:, 2:] = 0
    group.boxes[:, :, :2, 2:] = 0
    group.boxes[:, :, 0, :2] = targets[0]["boxes"][0, :2]
    (matches,) = match([group], gather_truth(targets, group.boxes), small_config())
    assert len(matches.query) == 4
