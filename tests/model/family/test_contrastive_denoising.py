"""Contrastive denoising: its noise, who sees whom, its losses, and that evaluation never knows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, generalized_box_iou

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family import contrastive_denoising
from model.family.contrastive_denoising import (
    ContrastiveDenoising,
    Noise,
    draw_noise,
    noised_boxes,
)
from model.family.denoising_groups import denoising_mask
from model.parts import Group, Queries, References

Config = Callable[..., ModelConfig]
Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]

SWITCHES = {
    "two_stage": True,
    "mixed_query_selection": True,
    "look_forward_twice": True,
    "denoising_pairs": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "dino": {"architecture": "dino", "two_stage": True, "denoising_pairs": 12},
    "deformable": SWITCHES,
    "with_one_to_many": SWITCHES | {"one_to_many_queries": 7},
}


def disturbed(config: ModelConfig) -> nn.Module:
    """In float64, with no parameter at zero."""
    torch.manual_seed(0)
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def some_targets(*counts: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "labels": torch.randint(0, 5, (n,), generator=generator),
            "boxes": 0.2 + 0.4 * torch.rand(n, 4, generator=generator),
        }
        for n in counts
    ]


def layers(outputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Of each decoder layer, the last one last."""
    return [*outputs["aux_outputs"], outputs]


def detecting(outputs: dict[str, Any]) -> list[Tensor]:
    return [x[name] for x in layers(outputs) for name in ("pred_logits", "pred_boxes")]


def denoised(outputs: dict[str, Any]) -> dict[str, Any]:
    (group,) = [x for x in outputs["groups"] if x["group"].name == "dn"]
    return group


def test_a_noised_box_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.1]], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).expand(1, 2, 1, 4)
    half = torch.full((1, 2, 1, 4), 0.5)
    noise = Noise(half[..., 0], half[..., 0].long(), signs, half)
    (positive,), (negative,) = noised_boxes(boxes, noise, scale=0.4)[0]
    # Corners (0.4, 0.35, 0.6, 0.45); a positive one's sides move by 0.5 * 0.4 of the half sizes
    # 0.1 and 0.05, a negative one's by 1.5 * 0.4 of them.
    corners = torch.tensor([0.42, 0.34, 0.58, 0.46], dtype=torch.float64)
    torch.testing.assert_close(box_convert(positive, "cxcywh", "xyxy"), corners)
    corners = torch.tensor([0.46, 0.32, 0.54, 0.48], dtype=torch.float64)
    torch.testing.assert_close(box_convert(negative, "cxcywh", "xyxy"), corners)


def test_the_bounds_of_the_noise() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.1], [0.3, 0.6, 0.1, 0.3]], dtype=torch.float64)
    noise = draw_noise(2000, boxes, num_classes=5)
    moved = box_convert(noised_boxes(boxes, noise, scale=0.8), "cxcywh", "xyxy")
    half = boxes[:, 2:].repeat(1, 2) / 2
    share = (moved - box_convert(boxes, "cxcywh", "xyxy")) / half / 0.8
    positive, negative = share.unbind(1)
    assert 0 <= positive.abs().min() < 0.01
    assert 0.99 < positive.abs().max() < 1
    assert 1 <= negative.abs().min() < 1.01
    assert 1.99 < negative.abs().max() < 2
    assert abs((share > 0).double().mean() - 0.5) < 0.01
    assert noise.label.unique().tolist() == [0, 1, 2, 3, 4]
    assert abs((noise.flip < 0.25).double().mean() - 0.25) < 0.02


def test_noised_boxes_stay_in_the_image() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.05, 0.9, 0.1, 0.2], [0.5, 0.5, 1.0, 1.0]])
    corners = box_convert(noised_boxes(boxes, draw_noise(50, boxes, 3), 1.0), "cxcywh", "xyxy")
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6


def test_draws_are_those_of_the_seed() -> None:
    boxes = torch.rand(3, 4)
    torch.manual_seed(5)
    first = draw_noise(4, boxes, 7)
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(first, draw_noise(4, boxes, 7), strict=True))


def queries_of(detect: int, *groups: Group) -> Queries:
    total = detect + sum(group.queries for group in groups)
    content = torch.randn(2, total, 32)
    references = torch.rand(2, total, 4)
    return Queries(content, None, References(references, references), groups=groups)


def test_who_sees_whom() -> None:
    """Three that detect, two of another group, then 2 groups of 4, counted one by one."""
    queries = queries_of(3, Group("other", 2))
    before = torch.tensor([[(i < 3) != (j < 3) for j in range(5)] for i in range(5)])
    mask = denoising_mask(queries._replace(mask=before), groups=2, size=4)
    owner = ["detects"] * 3 + ["other"] * 2 + ["first"] * 4 + ["second"] * 4
    for i, one in enumerate(owner):
        for j, other in enumerate(owner):
            sees = one == other or (one in ("first", "second") and other == "detects")
            assert bool(mask[i, j]) == (not sees), (i, j)


def test_each_query_is_where_and_what_it_says(small_config: Config) -> None:
    torch.manual_seed(0)
    config = small_config(**MODELS["dino"], hidden_dim=32, denoising_label_noise=0.5)
    part = ContrastiveDenoising(config)
    targets, before = some_targets(3, 0, 1), queries_of(4)
    before = Queries(
        torch.randn(3, 4, 32), None, References(torch.rand(3, 4, 4), torch.rand(3, 4, 4))
    )
    torch.manual_seed(1)
    queries = part(before, None, targets)
    torch.manual_seed(1)
    boxes = torch.cat([t["boxes"] for t in targets])
    noise = draw_noise(4, boxes, 5)
    moved = noised_boxes(boxes, noise, config.denoising_box_noise).clamp(0, 1)

    assert queries.content.shape == (3, 4 + 24, 32)
    content = torch.zeros(3, 24, 32)
    around = torch.full((3, 24, 4), 0.5)
    known = []
    where = [(image, box) for image, t in enumerate(targets) for box in range(len(t["labels"]))]
    for group in range(4):
        for sign in range(2):
            for target, (image, box) in enumerate(where):
                place = (group * 2 + sign) * 3 + box
                label = targets[image]["labels"][box]
                if noise.flip[group, sign, target] < 0.5:
                    label = noise.label[group, sign, target]
                content[image, place] = part.labels.weight[label]
                around[image, place] = moved[group, sign, target]
                if sign == 0:
                    known.append((place, target))
    torch.testing.assert_close(queries.content[:, 4:], content)
    for found in queries.references:
        # The published epsilon moves by a thousandth what is within a thousandth of 0 or 1.
        torch.testing.assert_close(found[:, 4:], around, rtol=0, atol=1.1e-3)
        inside = (around > 0.002) & (around < 0.998)
        torch.testing.assert_close(found[:, 4:][inside], around[inside])
    (group,) = queries.groups
    assert (group.name, group.queries, group.repeats, group.counted) == ("dn", 24, 4, None)
    assert list(zip(*(x.tolist() for x in group.known), strict=True)) == known
    assert torch.equal(queries.content[:, :4], before.content)


@pytest.mark.parametrize(
    ("counts", "groups", "places"),
    [((1, 1), 12, 2), ((4, 1), 3, 8), ((5, 0), 2, 10), ((13, 1), 1, 26), ((0, 0), 12, 0)],
)
def test_as_many_groups_as_there_is_room_for(
    counts: tuple[int, int], groups: int, places: int, small_config: Config
) -> None:
    part = ContrastiveDenoising(small_config(**MODELS["dino"], hidden_dim=32))
    (group,) = part(queries_of(3), None, some_targets(*counts)).groups
    assert (group.repeats, group.queries) == (groups, groups * places)


@pytest.mark.parametrize("name", MODELS)
def test_the_queries_that_detect_never_know(name: str, small_config: Config, batch: Batch) -> None:
    """In training they are the same whatever the ground truth, and without it."""
    images, padding, targets = batch
    model = disturbed(small_config(**MODELS[name])).train()
    with torch.no_grad():
        found = [model(images, padding, x) for x in (targets, some_targets(0, 6))]
        alone = model.requires_grad_(False)
        alone.training_queries = model.training_queries[:-1]
        found.append(alone(images, padding))
    for values in zip(*map(detecting, found), strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_a_group_never_knows_of_another(
    name: str, small_config: Config, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, padding, targets = batch
    model = disturbed(small_config(**MODELS[name])).train()
    found = []
    for change in (0.0, 0.5):

        def drawn(groups: int, boxes: Tensor, classes: int, change: float = change) -> Noise:
            torch.manual_seed(4)
            noise = draw_noise(groups, boxes, classes)
            noise.distance[1] = (noise.distance[1] + change) % 1
            return noise

        monkeypatch.setattr(contrastive_denoising, "draw_noise", drawn)
        with torch.no_grad():
            found.append(layers(denoised(model(images, padding, targets))))
    for one, other in zip(*found, strict=True):
        # Four groups of 6: the second one's noise has changed.
        one, other = (x["pred_boxes"].unflatten(1, (4, 6)) for x in (one, other))
        for group in (0, 2, 3):
            torch.testing.assert_close(one[:, group], other[:, group], rtol=1e-11, atol=1e-13)
        assert (one[0, 1] - other[0, 1]).abs().max() > 1e-3


def straightforward(
    outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], groups: int, eps: float
) -> list[Tensor]:
    """One layer's class, L1 and GIoU loss: of every image, group and place in turn."""
    most = max(len(t["labels"]) for t in targets)
    normalizer = groups * max(sum(len(t["labels"]) for t in targets), 1)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for logits, boxes, target in zip(
        outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True
    ):
        truth = target["boxes"].double()
        for query in range(2 * most * groups):
            box = query % most if query // most % 2 == 0 else most
            wanted = torch.zeros(logits.shape[1], dtype=torch.float64)
            if box < len(truth):
                wanted[target["labels"][box]] = 1
                sums[1] = sums[1] + (boxes[query] - truth[box]).abs().sum()
                sums[2] = sums[2] + 1 - overlap(boxes[query], truth[box], eps)
            p = logits[query].sigmoid()
            right = wanted * p + (1 - wanted) * (1 - p)
            alpha = 0.25 * wanted + 0.75 * (1 - wanted)
            sums[0] = sums[0] + (alpha * (1 - right) ** 2 * -right.log()).sum()
    return [x / normalizer for x in sums]


def overlap(box: Tensor, other: Tensor, eps: float) -> Tensor:
    """Generalised IoU of two boxes (cx, cy, w, h), `eps` added to what is divided by."""
    one, two = (box_convert(x[None], "cxcywh", "xyxy") for x in (box, other))
    if eps == 0:
        return generalized_box_iou(one, two)[0, 0]
    (ax, ay, bx, by), (cx, cy, dx, dy) = one[0], two[0]
    inner = (bx.minimum(dx) - ax.maximum(cx)).clamp(0) * (by.minimum(dy) - ay.maximum(cy)).clamp(0)
    union = box[2] * box[3] + other[2] * other[3] - inner
    hull = (bx.maximum(dx) - ax.minimum(cx)) * (by.maximum(dy) - ay.minimum(cy))
    return inner / (union + eps) - (hull - union) / (hull + eps)


@pytest.mark.parametrize("name", MODELS)
def test_losses_one_by_one(name: str, small_config: Config, batch: Batch) -> None:
    images, padding, targets = batch
    model = disturbed(small_config(**MODELS[name])).train()
    outputs = model(images, padding, targets)
    losses = build_criterion(model.config)(outputs, targets)
    eps = 1e-6 if name == "dino" else 0.0
    group = denoised(outputs)
    for ending, layer in zip(("_0_dn", "_dn"), layers(group), strict=True):
        expected = straightforward(layer, targets, groups=4, eps=eps)
        for loss, value in zip(("loss_ce", "loss_bbox", "loss_giou"), expected, strict=True):
            torch.testing.assert_close(losses[loss + ending], value, rtol=1e-9, atol=1e-12)
    # They come on top of all others.
    weights = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}
    total = sum(weights[k.split("_")[1]] * x for k, x in losses.items() if k != "loss")
    torch.testing.assert_close(losses["loss"], total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_the_same_and_costs_the_same(
    name: str, small_config: Config, batch: Batch
) -> None:
    images, padding, _ = batch
    with_dn = disturbed(small_config(**MODELS[name])).eval()
    without = build_model(small_config(**MODELS[name] | {"denoising_pairs": 0})).double().eval()
    state = with_dn.state_dict()
    label = f"training_queries.{len(with_dn.training_queries) - 1}.labels.weight"
    assert state.pop(label).shape == (6, 64)
    without.load_state_dict(state)
    found, costs = [], []
    for model in (with_dn, without):
        counter = FlopCounterMode(display=False)
        with counter:
            found.append(model(images, padding))
        costs.append(counter.get_flop_counts()["Global"])
    assert costs[0] == costs[1]
    assert found[0].keys() == found[1].keys()
    assert "groups" not in found[0]
    assert all(torch.equal(x, y) for x, y in zip(*map(detecting, found), strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("size", [(64, 96), (1, 1)])
def test_every_parameter_gets_a_gradient_also_without_boxes(
    size: tuple[int, int], queries: int, name: str, small_config: Config
) -> None:
    """One image, of which 64 x 96 or a single pixel is valid."""
    torch.manual_seed(0)
    model = build_model(small_config(**MODELS[name], num_queries=queries)).train()
    images, padding = torch.randn(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
    losses = build_criterion(model.config)(model(images, padding, some_targets(0)), some_targets(0))
    for ending in ("_0_dn", "_dn"):
        assert losses[f"loss_ce{ending}"] == losses[f"loss_giou{ending}"] == 0
    losses["loss"].backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


def test_the_positions_are_those_of_proposals_in_the_same_place(
    small_config: Config, batch: Batch
) -> None:
    images, padding, targets = batch
    model = disturbed(small_config(**SWITCHES))
    memory = model.encode(images, padding)
    before = model.queries(memory, model.heads)
    after = model.training_queries[0](before, memory, targets)
    torch.testing.assert_close(
        model.queries.position_of(after.references.attend, torch.float64), after.position
    )


def test_recomputed_layers_give_the_same_gradients(small_config: Config, batch: Batch) -> None:
    images, padding, targets = batch
    gradients = []
    for recompute in (False, True):
        model = disturbed(small_config(**MODELS["dino"], activation_checkpointing=recompute))
        torch.manual_seed(0)
        outputs = model.train()(images, padding, targets)
        build_criterion(model.config)(outputs, targets)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


def test_nothing_waits_for_the_gpu(small_config: Config) -> None:
    part = ContrastiveDenoising(small_config(**MODELS["dino"], hidden_dim=32))
    with FakeTensorMode():  # in which reading any number raises
        part.labels.weight = nn.Parameter(torch.empty(6, 32, device="cuda"))
        places = torch.empty(2, 3, 4, device="cuda")
        before = Queries(torch.empty(2, 3, 32, device="cuda"), None, References(places, places))
        targets = [
            {
                "labels": torch.zeros(n, dtype=torch.int64, device="cuda"),
                "boxes": torch.empty(n, 4, device="cuda"),
            }
            for n in (3, 1)
        ]
        with Hosts() as hosts:
            queries = part(before, None, targets)
    assert hosts.found == []
    assert queries.content.shape == (2, 3 + 24, 32)


class Hosts(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations that a tensor of the host takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                self.found.append(str(func))
        return result


def test_targets_are_asked_for_in_training(small_config: Config, batch: Batch) -> None:
    images, padding, _ = batch
    config = small_config(**MODELS["dino"])
    assert config.wants_targets
    with pytest.raises(ValueError, match="targets: got none in training"):
        build_model(config).train()(images, padding)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoising_pairs": -1}, "denoising_pairs: got -1, expected at least 0"),
        ({"denoising_pairs": 5}, "denoising_pairs: got 5 with deformable_detr and two_stage=False"),
        ({"mixed_query_selection": True}, "mixed_query_selection: got True"),
        ({"look_forward_twice": True}, "look_forward_twice: got True"),
        ({"architecture": "dino"}, "two_stage: got False with dino, expected True"),
        ({"architecture": "dino", "two_stage": True, "num_levels": 1}, "num_levels: got 1"),
        (
            {"architecture": "dino", "two_stage": True, "look_forward_twice": True},
            "look_forward_twice: got True with dino",
        ),
    ],
)
def test_what_no_model_can_be_built_from(
    changes: dict[str, Any], message: str, small_config: Config
) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
