"""One-to-many supervision: its queries, its loss, and that the queries that detect never know."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_convert, generalized_box_iou

from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.parts import Memory, Queries, References
from model.weights import load_official
from pipeline.recipes import recipe
from tests.model.test_weights import SMALL, published

Config = Callable[..., ModelConfig]
Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]
Detectors = tuple[nn.Module, nn.Module]

O2M = {"two_stage": True, "one_to_many_queries": 24, "one_to_many_repeats": 4}


def with_and_without(small_config: Config, **changes: Any) -> Detectors:
    """In float64, of the same weights, none of which is zero."""
    torch.manual_seed(0)
    with_o2m = build_model(small_config(**O2M, **changes)).double()
    for parameter in with_o2m.parameters():
        with torch.no_grad():
            parameter.add_(0.02 * torch.randn_like(parameter))
    without = build_model(small_config(two_stage=True, **changes)).double()
    own = without.state_dict()
    without.load_state_dict(
        {k: v[: len(own[k])] if v.dim() else v for k, v in with_o2m.state_dict().items()}
    )
    return with_o2m, without


def layers(outputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Of each decoder layer, the last one last."""
    return [*outputs["aux_outputs"], outputs]


def straightforward(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], repeats: int
) -> list[Tensor]:
    """One layer's class, L1 and GIoU loss: every target listed `repeats` times, then one query for
    each of that list, query by query."""
    normalizer = max(repeats * sum(len(t["labels"]) for t in targets), 1)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(3)]
    for x, found, target in zip(logits, boxes, targets, strict=True):
        labels, truth = (
            target["labels"].repeat(repeats),
            target["boxes"].double().repeat(repeats, 1),
        )
        p = x.sigmoid()
        present = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        absent = 0.75 * p**2 * -(1 - p + 1e-8).log()
        corners = (box_convert(b, "cxcywh", "xyxy") for b in (found, truth))
        overlap = generalized_box_iou(*corners)
        distance = torch.cdist(found, truth, p=1)
        cost = 2 * (present - absent)[:, labels] + 5 * distance - 2 * overlap
        matched = dict(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))
        for query in range(len(x)):
            for label in range(x.shape[1]):
                right = query in matched and labels[matched[query]] == label
                term = -nn.functional.logsigmoid(x[query, label] if right else -x[query, label])
                other = 1 - p[query, label] if right else p[query, label]
                sums[0] = sums[0] + (0.25 if right else 0.75) * other**2 * term
        for query, index in matched.items():
            sums[1] = sums[1] + (found[query] - truth[index]).abs().sum()
            sums[2] = sums[2] + 1 - overlap[query, index]
    return [x / normalizer for x in sums]


def some_targets(*counts: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "labels": torch.randint(0, 5, (n,), generator=generator),
            "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator),
        }
        for n in counts
    ]


def test_evaluation_is_the_same_and_costs_the_same(small_config: Config, batch: Batch) -> None:
    images, padding, _ = batch
    found, costs = [], []
    for model in with_and_without(small_config):
        counter = FlopCounterMode(display=False)
        with counter:
            found.append(model.eval()(images, padding))
        costs.append(counter.get_flop_counts()["Global"])
    assert costs[0] == costs[1]
    assert found[0].keys() == found[1].keys()
    for x, y in zip(layers(found[0]), layers(found[1]), strict=True):
        assert torch.equal(x["pred_logits"], y["pred_logits"])
        assert torch.equal(x["pred_boxes"], y["pred_boxes"])


def test_in_training_neither_set_of_queries_sees_the_other(
    small_config: Config, batch: Batch
) -> None:
    images, padding, _ = batch
    with_o2m, without = with_and_without(small_config)
    found, alone = (model.train()(images, padding) for model in (with_o2m, without))
    for x, y in zip(layers(found), layers(alone), strict=True):
        assert x["pred_logits"].shape[1] == 9
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(x[name], y[name], rtol=1e-11, atol=0)
    (group,) = found["groups"]
    # The decoder on the other queries alone gives the same.
    memory = with_o2m.encode(images, padding)
    queries = with_o2m.queries(memory, with_o2m.heads)
    assert queries.content.shape[1] == 9 + 24
    behind = queries._replace(
        content=queries.content[:, 9:],
        position=queries.position[:, 9:],
        references=References(*(x[:, 9:] for x in queries.references)),
    )
    predictions = with_o2m.decode(behind, memory)
    for x, (logits, boxes) in zip(layers(group), predictions, strict=True):
        torch.testing.assert_close(x["pred_logits"], logits, rtol=1e-11, atol=0)
        torch.testing.assert_close(x["pred_boxes"], boxes, rtol=1e-11, atol=0)


def test_denoising_beside_them_is_seen_by_neither(small_config: Config, batch: Batch) -> None:
    """All that `deformable_detr_r50_12ep` has in training, against evaluation and against the same
    without denoising."""
    images, padding, targets = batch
    torch.manual_seed(0)
    tricks = {"mixed_query_selection": True, "look_forward_twice": True}
    model = build_model(small_config(**O2M, **tricks, denoising_pairs=6)).double().train()
    found = model(images, padding, targets)
    assert [group["group"].name for group in found["groups"]] == ["o2m", "dn"]
    without = build_model(small_config(**O2M, **tricks)).double().train()
    without.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        (group,) = without(images, padding)["groups"]
        alone = model.eval()(images, padding)
    for x, y in ((found, alone), (found["groups"][0], group)):
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(x[name], y[name], rtol=1e-11, atol=0)


def test_the_other_queries_are_the_next_best_proposals(small_config: Config, batch: Batch) -> None:
    images, padding, _ = batch
    model, _ = with_and_without(small_config)
    memory = model.encode(images, padding)
    queries = model.queries(memory, model.heads)
    first = queries.first_stage
    for image in range(2):
        scores = first["pred_logits"][image, :, 0].tolist()
        ranked = sorted(range(len(scores)), key=lambda token: -scores[token])[: 9 + 24]
        expected = first["pred_boxes"][image, ranked]
        torch.testing.assert_close(queries.references.attend[image], expected, rtol=0, atol=0)
    assert not queries.references.correct.requires_grad


# Four times eleven boxes are more than the 24 queries.
@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (11, 5), (0, 0)])
def test_losses_are_those_of_repeated_targets(
    counts: tuple[int, int], small_config: Config, batch: Batch
) -> None:
    images, padding, _ = batch
    model, without = with_and_without(small_config)
    targets = some_targets(*counts)
    outputs = model.train()(images, padding)
    losses = build_criterion(model.config)(outputs, targets)
    expected = build_criterion(without.config)(without.train()(images, padding), targets)
    (group,) = outputs["groups"]
    total = expected["loss"]
    for ending, layer in zip(("_0_o2m", "_o2m"), layers(group), strict=True):
        values = straightforward(layer["pred_logits"], layer["pred_boxes"], targets, 4)
        for name, weight, value in zip(
            ("loss_ce", "loss_bbox", "loss_giou"), (2, 5, 2), values, strict=True
        ):
            torch.testing.assert_close(losses[name + ending], value, rtol=1e-7, atol=1e-12)
            total = total + weight * value
    torch.testing.assert_close(losses["loss"], total, rtol=1e-7, atol=0)
    for name, value in expected.items():
        if name != "loss":
            torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=0)
    assert len(losses) == len(expected) + 6


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("size", [(96, 128), (1, 1)])
def test_every_parameter_gets_a_gradient_also_without_boxes(
    size: tuple[int, int], queries: int, small_config: Config
) -> None:
    """One image, of which 96 x 128 or a single pixel is valid; with a few tokens there are fewer
    queries than asked for, or none, in the group."""
    torch.manual_seed(0)
    model = build_model(small_config(**O2M, num_queries=queries)).train()
    images, padding = torch.randn(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
    outputs = model(images, padding)
    (group,) = outputs["groups"]
    tokens = outputs["enc_outputs"]["pred_logits"].shape[1]
    assert group["pred_logits"].shape[1] == min(24, max(0, tokens - queries))
    losses = build_criterion(model.config)(outputs, some_targets(0))
    assert {"loss_ce_o2m", "loss_giou_0_o2m"} <= losses.keys()
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_recomputed_layers_give_the_same_gradients(small_config: Config, batch: Batch) -> None:
    images, padding, targets = batch
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = small_config(**O2M, activation_checkpointing=recompute)
        model = build_model(config).double().train()
        build_criterion(config)(model(images, padding), targets)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


def test_the_queries_of_training_are_one_graph(small_config: Config, batch: Batch) -> None:
    """Everything before the decoder's layers, which are those of evaluation."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    images, padding, _ = batch
    model = build_model(small_config(**O2M)).train()
    (one_to_many,) = model.training_queries

    def ask(memory: Memory) -> Queries:
        return one_to_many(model.queries(memory, model.heads), memory, None)

    with torch.no_grad():
        memory = model.encode(images, padding)
        found = torch.compile(ask, fullgraph=True, dynamic=True, backend="eager")(memory)
        expected = ask(memory)
    assert found.groups == expected.groups
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.references.attend, expected.references.attend)
    torch._dynamo.reset()


def test_the_published_model_has_these_parameters() -> None:
    """Counted in H-Deformable-DETR's own model: ResNet-50, tricks and hybrid branch, 300 + 1500
    queries. The recipe has denoising beside."""
    config = recipe("deformable_detr_r50_12ep").model
    with torch.device("meta"):
        parameters = list(build_model(replace(config, denoising_pairs=0)).parameters())
    assert sum(p.numel() for p in parameters) == 47_946_073
    assert sum(p.numel() for p in parameters if p.requires_grad) == 47_723_673


def test_published_weights_have_a_content_for_all_queries() -> None:
    config = ModelConfig(**SMALL, **O2M, mixed_query_selection=True, look_forward_twice=True)
    model = build_model(config)
    state = published(refine=True, two_stage=True, levels=4)
    with pytest.raises(
        ValueError, match=r"missing keys: query_embed\.weight; unexpected keys: none"
    ):
        load_official(model, state)
    state["query_embed.weight"] = torch.randn(6, 32)
    with pytest.raises(ValueError, match=r"queries\.embed: got \(6, 32\), expected \(30, 32\)"):
        load_official(model, state)
    state["query_embed.weight"] = torch.randn(6 + 24, 32)
    load_official(model, state)
    assert torch.equal(model.queries.embed, state["query_embed.weight"])


def test_queries_of_a_first_stage_are_asked_for(small_config: Config) -> None:
    with pytest.raises(ValueError, match="one_to_many_queries: got 5 with two_stage=False"):
        small_config(one_to_many_queries=5)
    config = small_config(**O2M)
    with pytest.raises(ValueError, match="one_to_many_queries: got -1, expected at least 0"):
        replace(config, one_to_many_queries=-1)
    with pytest.raises(ValueError, match="one_to_many_repeats: got 0, expected at least 1"):
        replace(config, one_to_many_repeats=0)
