"""DETR against transformers' `DetrForObjectDetection`, PyTorch's attention and cross entropy."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from model.attention import CrossAttention
from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.postprocess import postprocess
from model.weights import load_official
from tests.model.beside_transformers import (
    assert_close_gradient,
    assert_same_outputs,
    with_random_weights,
)

SMALL = ModelConfig(
    architecture="detr",
    classification="softmax",
    num_classes=7,
    num_queries=12,
    num_levels=1,
    hidden_dim=64,
    num_heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward_dim=96,
    dropout=0.0,
    class_weight=1.0,
    class_cost=1.0,
)


def test_outputs_and_gradients(published_names: Callable) -> None:
    torch.manual_seed(3)
    theirs = DetrForObjectDetection(
        DetrConfig(
            backbone_config=ResNetConfig(out_features=["stage4"]),
            num_labels=7,
            num_queries=12,
            d_model=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_layers=2,
            decoder_layers=3,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            dropout=0.0,
            # With auxiliary losses transformers hands the normed state of each decoder layer to the
            # next one; the published model does not.
            auxiliary_loss=False,
            attn_implementation="eager",
        )
    )
    with_random_weights(theirs)
    ours = build_model(SMALL).double()
    load_official(ours, published_names("detr", theirs.state_dict()))
    _, _, gradients = assert_same_outputs(ours, theirs)
    gradients = published_names("detr", gradients)
    for module, name, rows in (
        (ours.encoder[0].attention.query_key_proj, "encoder.layers.0.self_attn.in_proj_", 128),
        (
            ours.decoder[1].cross_attention.query_proj,
            "decoder.layers.1.multihead_attn.in_proj_",
            64,
        ),
        (ours.decoder[2].feedforward.linear2, "decoder.layers.2.linear2.", 64),
        (ours.heads.norm, "decoder.norm.", 64),
    ):
        wanted = gradients[f"transformer.{name}weight"][:rows]
        assert_close_gradient(module.weight.grad, wanted, name)


def test_cross_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(hidden_dim=32, num_heads=4, dropout=0.0).double()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        inputs = (ours.query_proj, ours.key_proj, ours.value_proj)
        theirs.in_proj_weight.copy_(torch.cat([x.weight for x in inputs]))
        theirs.in_proj_bias.copy_(torch.cat([x.bias for x in inputs]))
        theirs.out_proj.load_state_dict(ours.output_proj.state_dict())
    query = torch.randn(2, 5, 32, dtype=torch.float64)
    key, value = torch.randn(2, 2, 9, 32, dtype=torch.float64)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 4:] = True
    expected, _ = theirs(query, key, value, key_padding_mask=padding)
    torch.testing.assert_close(ours(query, key, value, padding), expected, rtol=1e-10, atol=1e-12)


def random_outputs(queries: int = 9) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)

    def layer() -> dict[str, Tensor]:
        boxes = 0.1 + 0.4 * torch.rand(2, queries, 4, generator=generator, dtype=torch.float64)
        logits = torch.randn(2, queries, 8, generator=generator, dtype=torch.float64)
        return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}

    return {**layer(), "aux_outputs": [layer(), layer()], "classification": "softmax"}


def targets(*counts: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "labels": torch.randint(0, 7, (n,), generator=generator),
            "boxes": 0.2 + 0.3 * torch.rand(n, 4, generator=generator, dtype=torch.float64),
        }
        for n in counts
    ]


@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (0, 0)])
def test_classification_is_pytorchs_weighted_cross_entropy(counts: tuple[int, int]) -> None:
    """Matched here by the smallest of all assignments' costs, one query at a time."""
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import generalized_box_iou

    from model.boxes import cxcywh_to_xyxy

    outputs, truth = random_outputs(), targets(*counts)
    losses = build_criterion(SMALL)(outputs, truth)
    for suffix, layer in (("_0", 0), ("_1", 1), ("", None)):
        predicted = outputs if layer is None else outputs["aux_outputs"][layer]  # type: ignore[index]
        logits, boxes = predicted["pred_logits"].detach(), predicted["pred_boxes"].detach()
        wanted = torch.full((2, 9), 7)
        for image, target in enumerate(truth):
            cost = (
                -logits[image].softmax(-1)[:, target["labels"]]
                + 5 * torch.cdist(boxes[image], target["boxes"], p=1)
                - 2
                * generalized_box_iou(cxcywh_to_xyxy(boxes[image]), cxcywh_to_xyxy(target["boxes"]))
            )
            query, box = linear_sum_assignment(cost)
            wanted[image, query] = target["labels"][box]
        weight = torch.ones(8, dtype=torch.float64)
        weight[7] = torch.tensor(0.1)  # in float32, as published
        expected = F.cross_entropy(logits.transpose(1, 2), wanted, weight)
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], expected, rtol=1e-12, atol=1e-12)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    outputs, truth = random_outputs(), targets(3, 1)
    criterion = build_criterion(SMALL)
    whole = criterion(outputs, truth)["loss"]

    def part(image: int) -> dict[str, object]:
        cut = slice(image, image + 1)
        layers = [outputs, *outputs["aux_outputs"]]  # type: ignore[misc]
        cuts = [{k: layer[k][cut] for k in ("pred_logits", "pred_boxes")} for layer in layers]
        return {**cuts[0], "aux_outputs": cuts[1:]}

    mean = torch.tensor(4 / 2)  # boxes of a part, on average
    parts = [criterion(part(i), truth[i : i + 1], mean)["loss"] for i in range(2)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, rtol=1e-7, atol=0)


def test_postprocess_gives_each_query_its_best_class() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 3.0, 5.0], [0.5, 4.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.3, 0.4, 0.2, 0.2]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "classification": "softmax"}
    (result,) = postprocess(outputs, torch.tensor([[100, 200]]), top=2)
    probability = logits[0].softmax(-1)
    assert result["labels"].tolist() == [1, 0]
    torch.testing.assert_close(
        result["scores"], torch.stack((probability[2, 1], probability[0, 0]))
    )
    torch.testing.assert_close(
        result["boxes"], torch.tensor([[40.0, 30, 80, 50], [80.0, 30, 120, 70]])
    )


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_a_training_step(
    classification: str, batch: tuple, small_config: Callable[..., ModelConfig]
) -> None:
    config = small_config(
        architecture="detr", classification=classification, num_levels=1, auxiliary_loss=True
    )
    model, criterion = build_model(config), build_criterion(config)
    images, padding, truth = batch
    outputs = model(images, padding)
    assert outputs["pred_logits"].shape == (2, 9, 5 + (classification == "softmax"))
    criterion(outputs, truth)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 4}, "architecture: got detr with num_levels=4"),
        ({"two_stage": True}, "two_stage=True"),
        ({"architecture": "deformable_detr"}, "classification: got softmax with deformable_detr"),
        ({"no_object_weight": 0.0}, "no_object_weight: got 0.0"),
    ],
)
def test_what_is_no_detr_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
