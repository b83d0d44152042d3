"""The denoising queries of DN-DETR: noise, mask, training forward and losses, each worked out once
more; that they give nothing away, and cost nothing at inference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.family import denoising
from model.family.denoising import Noise, draw_noise, noised_boxes
from model.family.denoising_groups import denoising_mask
from model.parts import Queries, Targets
from tests.model.family.plain_dab import (
    as_leaves,
    check_gradients,
    loaded,
    plain_dab_detr,
    published_transformer,
    random,
)
from tests.model.family.plain_detr import State
from tests.model.test_detr import Crossings, pretend_on_gpu

GROUPS, QUERIES, WIDTH, CLASSES = 3, 5, 32, 7
CONFIG = ModelConfig(
    architecture="dab_detr",
    num_classes=CLASSES,
    num_queries=QUERIES,
    num_levels=1,
    hidden_dim=WIDTH,
    num_heads=4,
    feedforward_dim=48,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
    denoising_groups=GROUPS,
)
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}
IMAGES = torch.zeros(3, 3, 64, 96, dtype=torch.float64)
PADDING = torch.zeros(3, 64, 96, dtype=torch.bool)
PADDING[1, 30:], PADDING[1, :, 50:] = True, True
VALID = [(2, 3), (1, 2), (2, 3)]


def targets_of(*counts: int) -> Targets:
    generator = torch.Generator().manual_seed(8)
    targets = []
    for count in counts:
        boxes = 0.1 + 0.8 * torch.rand(count, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes})
    return targets


def case() -> tuple[Any, State]:
    torch.manual_seed(6)
    state = published_transformer(WIDTH, 48, CLASSES, QUERIES, layers=2)
    state["label_enc.weight"] = random(CLASSES + 1, WIDTH - 1)
    return loaded(CONFIG, state, random(3, 2048, 2, 3)), state


def test_boxes_move_no_further_than_they_may() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.4, 0.3, 0.1]])
    shift = draw_noise(2000, boxes, 5).shift
    moved = noised_boxes(boxes, shift, 0.4)
    change = (moved - boxes) / torch.cat((boxes[:, 2:] / 2, boxes[:, 2:]), dim=1)
    assert (change.abs() <= 0.4 + 1e-6).all()
    assert (change.amax((0, 1)) > 0.39).all()
    assert (change.amin((0, 1)) < -0.39).all()
    assert change.mean().abs() < 0.01
    # So the centre stays inside the box, and the size within 0.6 and 1.4 of itself.
    assert ((moved[..., :2] - boxes[:, :2]).abs() < boxes[:, 2:] / 2).all()


def test_boxes_moved_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 1.0, 0.5]])
    shift = torch.tensor([[[1.0, -1.0, 0.5, 0.0], [1.0, -1.0, 1.0, -1.0]]])
    expected = torch.tensor([[[0.54, 0.42, 0.24, 0.4], [1.0, 0.0, 1.0, 0.3]]])
    torch.testing.assert_close(noised_boxes(boxes, shift, 0.4), expected)


def test_draws_have_the_distributions_that_they_say() -> None:
    torch.manual_seed(1)
    noise = draw_noise(5, torch.zeros(4000, 4), CLASSES)
    assert noise.flip.shape == noise.label.shape == (5, 4000)
    assert abs((noise.flip < 0.2).double().mean() - 0.2) < 0.01
    counts = noise.label.flatten().bincount(minlength=CLASSES)
    assert len(counts) == CLASSES
    assert (counts / 20_000 - 1 / CLASSES).abs().max() < 0.01
    assert -1 <= noise.shift.min() < -0.99
    assert 0.99 < noise.shift.max() <= 1
    again = torch.manual_seed(1) and draw_noise(5, torch.zeros(4000, 4), CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(noise, again, strict=True))


def mask_of(queries: int, groups: int, slots: int) -> Tensor:
    return denoising_mask(Queries(torch.zeros(1, queries, 1), None, None), groups, slots)


@pytest.mark.parametrize(
    ("queries", "groups", "slots"), [(4, 3, 2), (1, 1, 1), (1, 5, 3), (6, 2, 0)]
)
def test_the_mask_by_loops(queries: int, groups: int, slots: int) -> None:
    mask = mask_of(queries, groups, slots)
    total = queries + groups * slots
    assert mask.shape == (total, total)
    for looking in range(total):
        for at in range(total):
            if at < queries:
                hidden = False  # all see those that detect
            elif looking < queries:
                hidden = True
            else:
                hidden = (looking - queries) // slots != (at - queries) // slots
            assert mask[looking, at] == hidden, (looking, at)


def plain_queries(
    state: State, targets: Targets, noise: Noise
) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int, int]]]:
    """Contents and anchors of each image, denoising ones behind the others, and of each denoising
    query that has a box (image, place among all queries of the image, box of the image)."""
    none = torch.cat((state["label_enc.weight"][CLASSES], torch.zeros(1).double()))
    slots = max(len(target["labels"]) for target in targets)
    contents, anchors, filled = [], [], []
    first = 0
    for image, target in enumerate(targets):
        content = [none] * QUERIES
        anchor = list(state["refpoint_embed.weight"].sigmoid())
        for group in range(GROUPS):
            for slot in range(slots):
                if slot >= len(target["labels"]):
                    content.append(torch.zeros(WIDTH).double())
                    anchor.append(torch.full((4,), 0.5).double())
                    continue
                label = int(target["labels"][slot])
                if noise.flip[group, first + slot] < 0.2:
                    label = int(noise.label[group, first + slot])
                x, y, w, h = target["boxes"][slot]
                a, b, c, d = 0.4 * noise.shift[group, first + slot]
                moved = torch.stack((x + a * w / 2, y + b * h / 2, w + c * w, h + d * h))
                moved = moved.clamp(0, 1)
                logits = (moved.clamp(min=1e-3) / (1 - moved).clamp(min=1e-3)).log()
                filled.append((image, len(content), slot))
                content.append(
                    torch.cat((state["label_enc.weight"][label], torch.ones(1).double()))
                )
                anchor.append(logits.sigmoid())
        contents.append(torch.stack(content))
        anchors.append(torch.stack(anchor))
        first += len(target["labels"])
    return contents, anchors, filled


def plain_losses(
    logits: Tensor, boxes: Tensor, targets: Targets, filled: list[tuple[int, int, int]]
) -> dict[str, Tensor]:
    """Of one layer's denoising queries: each is its own box's, so there is nothing to match."""
    sums = {"loss_ce": 0, "loss_bbox": 0, "loss_giou": 0}
    for image, place, box in filled:
        label = int(targets[image]["labels"][box])
        for column in range(CLASSES):
            p = logits[image, place, column].sigmoid()
            wrong, alpha = (1 - p, 0.25) if column == label else (p, 0.75)
            sums["loss_ce"] = sums["loss_ce"] - alpha * wrong**2 * (1 - wrong).log()
        found, wanted = boxes[image, place], targets[image]["boxes"][box]
        sums["loss_bbox"] = sums["loss_bbox"] + (found - wanted).abs().sum()
        sums["loss_giou"] = sums["loss_giou"] + 1 - plain_giou(found, wanted)
    return {name: total / max(len(filled), 1) for name, total in sums.items()}


def plain_giou(first: Tensor, second: Tensor) -> Tensor:
    """As IDEA-Research has it, with 1e-6 added to what is divided by."""
    low, high = first[:2] - first[2:] / 2, first[:2] + first[2:] / 2
    low2, high2 = second[:2] - second[2:] / 2, second[:2] + second[2:] / 2
    common = (torch.minimum(high, high2) - torch.maximum(low, low2)).clamp(min=0).prod()
    hull = (torch.maximum(high, high2) - torch.minimum(low, low2)).prod()
    union = first[2:].prod() + second[2:].prod() - common
    return common / (union + 1e-6) - (hull - union) / (hull + 1e-6)


@pytest.mark.parametrize("counts", [(2, 0, 3), (1, 1, 1)])
def test_a_training_step_is_that_of_a_plain_one(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = case()
    targets = targets_of(*counts)
    torch.manual_seed(3)
    noise = draw_noise(GROUPS, torch.cat([target["boxes"] for target in targets]), CLASSES)
    noise = noise._replace(flip=noise.flip / 2)  # so that a third and more are flipped
    assert (noise.flip < 0.2).any()
    monkeypatch.setattr(denoising, "draw_noise", lambda *_: noise)
    outputs = model.train()(IMAGES, PADDING, targets)
    losses = build_criterion(CONFIG)(outputs, targets)

    state = as_leaves(state)
    contents, anchors, filled = plain_queries(state, targets, noise)
    sees = ~mask_of(QUERIES, GROUPS, max(counts))
    features = model.backbone.maps[0]
    expected = plain_dab_detr(state, features, VALID, contents, anchors, 4, sees)
    denoised = outputs["groups"][0]
    assert denoised["group"].name == "dn"
    weighted = torch.zeros(()).double()
    for layer, (logits, boxes) in enumerate(expected):
        last = layer == len(expected) - 1
        found = (
            (outputs, denoised)
            if last
            else (outputs["aux_outputs"][layer], denoised["aux_outputs"][layer])
        )
        together = {
            name: torch.cat([part[name] for part in found], dim=1)
            for name in ("pred_logits", "pred_boxes")
        }
        torch.testing.assert_close(together["pred_logits"], logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together["pred_boxes"], boxes, rtol=1e-9, atol=1e-9)
        for name, value in plain_losses(logits, boxes, targets, filled).items():
            suffix = "_dn" if last else f"_{layer}_dn"
            torch.testing.assert_close(losses[name + suffix], value, rtol=1e-9, atol=1e-12)
            weighted = weighted + WEIGHTS[name] * value
    sum_of_dn = sum(
        WEIGHTS["_".join(name.split("_")[:2])] * value
        for name, value in losses.items()
        if name.endswith("_dn")
    )
    torch.testing.assert_close(sum_of_dn, weighted)
    sum_of_dn.backward()
    weighted.backward()
    assert model.queries.labels.weight.grad[:CLASSES].abs().max() > 0
    check_gradients(model, state)


def test_the_total_has_the_weighted_losses_of_the_group() -> None:
    model, _ = case()
    targets = targets_of(2, 0, 3)
    losses = build_criterion(CONFIG)(model.train()(IMAGES, PADDING, targets), targets)
    names = [
        f"{name}{layer}{group}" for name in WEIGHTS for layer in ("", "_0") for group in ("", "_dn")
    ]
    assert set(losses) == {*names, "loss"}
    total = sum(WEIGHTS["_".join(name.split("_")[:2])] * losses[name] for name in names)
    torch.testing.assert_close(losses["loss"], total)


def test_nothing_of_the_ground_truth_reaches_the_queries_that_detect() -> None:
    model, _ = case()
    with torch.no_grad():
        expected = model.eval()(IMAGES, PADDING)
        found = [model.train()(IMAGES, PADDING, targets_of(*c)) for c in ((2, 0, 3), (0, 0, 0))]
    assert "groups" not in expected
    for outputs in found:
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-9, atol=1e-12)
            for one, other in zip(outputs["aux_outputs"], expected["aux_outputs"], strict=True):
                torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_groups_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = case()
    targets = targets_of(2, 1, 3)
    noise = draw_noise(GROUPS, torch.cat([target["boxes"] for target in targets]), CLASSES)
    shift = noise.shift.clone()
    shift[1] = -shift[1]
    found = []
    for drawn in (noise, noise._replace(shift=shift)):
        monkeypatch.setattr(denoising, "draw_noise", lambda *_, drawn=drawn: drawn)
        with torch.no_grad():
            found.append(model.train()(IMAGES, PADDING, targets)["groups"][0]["pred_logits"])
    first, second = (x.unflatten(1, (GROUPS, 3)) for x in found)
    changed = (first - second).abs().amax((0, 2, 3))
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() < 1e-12


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 0, 1)])
@pytest.mark.parametrize("architecture", ["dab_detr", "dab_deformable_detr"])
def test_every_parameter_gets_a_gradient(
    architecture: str, counts: tuple[int, ...], small_config: Callable[..., ModelConfig]
) -> None:
    dense = architecture == "dab_detr"
    config = small_config(
        architecture=architecture,
        denoising_groups=2,
        num_queries=1,
        num_levels=1 if dense else 4,
        box_refine=not dense,
        num_classes=CLASSES,
    )
    model, targets = build_model(config).train(), targets_of(*counts)
    outputs = model(torch.randn(3, 3, 64, 96), PADDING, targets)
    assert outputs["groups"][0]["pred_logits"].shape == (3, 2 * max(counts), CLASSES)
    losses = build_criterion(config)(outputs, targets)
    if not sum(counts):
        assert all(value == 0 for name, value in losses.items() if name.endswith("_dn"))
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_queries_and_denoising_learn_one_table_of_labels(
    small_config: Callable[..., ModelConfig],
) -> None:
    model = build_model(small_config(architecture="dab_detr", num_levels=1, denoising_groups=2))
    assert [name for name in model.state_dict() if "labels" in name] == ["queries.labels.weight"]
    assert not any(name.startswith("training_queries.") for name in model.state_dict())


def test_a_copy_learns_its_own_table(small_config: Callable[..., ModelConfig]) -> None:
    config = small_config(
        architecture="dab_detr", num_levels=1, denoising_groups=2, num_classes=CLASSES
    )
    model = build_model(config)
    copied = copy.deepcopy(model)
    targets = targets_of(1, 0, 2)
    outputs = copied.train()(torch.randn(3, 3, 64, 96), PADDING, targets)
    outputs["groups"][0]["pred_logits"].sum().backward()
    assert copied.queries.labels.weight.grad.abs().max() > 0
    assert model.queries.labels.weight.grad is None


def test_recomputed_layers_give_the_same_gradients(
    small_config: Callable[..., ModelConfig],
) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = small_config(
            architecture="dab_detr",
            num_levels=1,
            denoising_groups=2,
            num_classes=CLASSES,
            activation_checkpointing=checkpointing,
        )
        model = build_model(config).train()
        targets = targets_of(1, 0, 2)
        outputs = model(torch.randn(3, 3, 64, 96), PADDING, targets)
        build_criterion(config)(outputs, targets)["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_targets_are_asked_for_in_training_alone(small_config: Callable[..., ModelConfig]) -> None:
    config = small_config(architecture="dab_detr", num_levels=1, denoising_groups=2)
    assert config.wants_targets
    assert not small_config(architecture="dab_detr", num_levels=1).wants_targets
    model, images = build_model(config), torch.randn(3, 3, 64, 96)
    model.eval()(images, PADDING)
    with pytest.raises(ValueError, match="targets: got none in training, expected them"):
        model.train()(images, PADDING)


def test_the_training_forward_never_waits_for_the_gpu(
    small_config: Callable[..., ModelConfig],
) -> None:
    config = small_config(architecture="dab_detr", num_levels=1, denoising_groups=2)
    model = build_model(config).train()
    with FakeTensorMode():  # in which reading any number raises
        pretend_on_gpu(model)
        images = torch.zeros(2, 3, 96, 128, device="cuda")
        padding = torch.zeros(2, 96, 128, dtype=torch.bool, device="cuda")
        targets = [
            {
                "labels": torch.zeros(count, dtype=torch.int64, device="cuda"),
                "boxes": torch.zeros(count, 4, device="cuda"),
            }
            for count in (3, 1)
        ]
        with Crossings() as crossings:
            outputs = model(images, padding, targets)
    assert crossings.found == []
    assert outputs["groups"][0]["pred_boxes"].shape == (2, 6, 4)
