"""Faster R-CNN against torchvision's own `fasterrcnn_resnet50_fpn`, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from model.boxes import xyxy_to_cxcywh
from model.config import ModelConfig
from model.criterion import build_criterion
from model.detr import build_model
from model.postprocess import postprocess
from model.weights import load_backbone, load_official
from pipeline.recipes import recipe

PUBLISHED = recipe("faster_rcnn_r50_fpn").model
CONFIG = replace(PUBLISHED, sampled_proposals=128)  # a quarter, for speed
SIZES = [(96, 128), (64, 90)]  # (height, width) of the two images
TRUTH = [
    {
        "labels": torch.tensor([1, 17, 90]),
        "boxes": torch.tensor([[10.0, 20, 60, 80], [3, 4, 120, 90], [100, 70, 116, 88]]).double(),
    },
    {"labels": torch.tensor([44]), "boxes": torch.tensor([[20.0, 10, 80, 60]]).double()},
]


def theirs_and_ours() -> tuple[TorchvisionFasterRCNN, nn.Module]:
    """Equal weights, through the published names; without torchvision's transform."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, box_batch_size_per_image=128
    ).double()
    for name, parameter in theirs.named_parameters():
        if name.startswith("backbone.body") and not name.startswith("backbone.body.layer"):
            parameter.requires_grad_(False)
        if name.startswith("backbone.body.layer1"):
            parameter.requires_grad_(False)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0  # what torchvision sets with the published weights
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.6, 1.4)
                module.weight.uniform_(0.3, 0.9)
                module.requires_grad_(False)
        theirs.rpn.head.cls_logits.weight.normal_(0, 0.1)
        theirs.rpn.head.bbox_pred.weight.normal_(0, 0.02)
    theirs.transform.image_mean, theirs.transform.image_std = [0.0] * 3, [1.0] * 3
    theirs.transform.resize = lambda image, target: (image, target)
    spread(theirs.eval())
    ours = build_model(CONFIG).double()
    load_official(ours, theirs.state_dict())
    return theirs, ours


@torch.no_grad()
def spread(theirs: TorchvisionFasterRCNN) -> None:
    """Scales the last layers until the softmax is far from uniform and boxes move."""
    predictor, seen = theirs.roi_heads.box_predictor, []
    handle = predictor.register_forward_hook(lambda module, args, out: seen.extend(out))
    theirs(images())
    handle.remove()
    for layer, values, wanted in (
        (predictor.cls_score, seen[0], 3),
        (predictor.bbox_pred, seen[1], 1),
    ):
        layer.bias.zero_()
        layer.weight.mul_(wanted / values.std())


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]


def padded(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    height, width = (max(x.shape[axis] for x in parts) for axis in (1, 2))
    whole = torch.zeros(len(parts), 3, height, width, dtype=torch.float64)
    mask = torch.ones(len(parts), height, width, dtype=torch.bool)
    for index, part in enumerate(parts):
        whole[index, :, : part.shape[1], : part.shape[2]] = part
        mask[index, : part.shape[1], : part.shape[2]] = False
    return whole, mask


def normalised(truth: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    result = []
    for target, (height, width) in zip(truth, SIZES, strict=True):
        scale = torch.tensor((width, height, width, height), dtype=torch.float64)
        result.append(
            {"labels": target["labels"], "boxes": xyxy_to_cxcywh(target["boxes"]) / scale}
        )
    return result


def test_detections_losses_and_gradients_are_torchvisions() -> None:
    theirs, ours = theirs_and_ours()
    with torch.no_grad():
        expected = theirs.eval()(images())
        outputs = ours.eval()(*padded(images()))
        found = postprocess(outputs, torch.tensor(SIZES))
        twice = postprocess(outputs, 2 * torch.tensor(SIZES), top=5)
    for ours_found, larger, theirs_found in zip(found, twice, expected, strict=True):
        assert len(theirs_found["scores"]) > 20
        assert len(theirs_found["labels"].unique()) > 1
        for name, value in theirs_found.items():
            torch.testing.assert_close(ours_found[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(larger["boxes"], 2 * theirs_found["boxes"][:5])
        assert torch.equal(larger["labels"], theirs_found["labels"][:5])

    theirs.train().backbone.eval()  # batch norms stay frozen, as in ours
    torch.manual_seed(5)
    expected_losses = theirs(images(), [dict(t) for t in TRUTH])
    torch.manual_seed(5)
    losses = build_criterion(CONFIG)(ours.train()(*padded(images())), normalised(TRUTH))
    assert losses.keys() == {*expected_losses, "loss"}
    for name, value in expected_losses.items():
        assert value > 0
        torch.testing.assert_close(losses[name], value, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["loss"], sum(expected_losses.values()))

    losses["loss"].backward()
    sum(expected_losses.values()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    own = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(own) == len(gradients)
    for name, value in own.items():
        published = name if name.startswith(("rpn", "roi")) else f"backbone.{name}"
        published = published.replace("backbone.backbone.", "backbone.body.")
        published = published.replace(".downsample.weight", ".downsample.0.weight")
        wanted = gradients[published]
        if ".bn" in name or "conv" in name:  # theirs keep scale and convolution apart
            assert value.shape == wanted.shape
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9 * wanted.abs().max().item())


def test_the_published_file_is_older_than_two_modules() -> None:
    theirs, ours = theirs_and_ours()
    state = theirs.state_dict()
    old = {
        name.replace("_blocks.0.0.", "_blocks.0.").replace("conv.0.0.", "conv."): value
        for name, value in state.items()
    }
    for level in (1, 2, 3):
        old = {n.replace(f"_blocks.{level}.0.", f"_blocks.{level}."): v for n, v in old.items()}
    assert "rpn.head.conv.weight" in old
    assert "backbone.fpn.inner_blocks.3.bias" in old
    other = build_model(CONFIG).double()
    load_official(other, old)
    for name, value in ours.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name

    del old["rpn.head.conv.weight"]
    old["roi_heads.mask_head.weight"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing keys: rpn\.head\.conv\.0\.0\.weight; unexpec"
    ) as e:
        load_official(other, old)
    assert "roi_heads.mask_head.weight" in str(e.value)


def test_the_parameters_are_the_published_ones(tmp_path) -> None:
    model = build_model(PUBLISHED)
    assert sum(p.numel() for p in model.parameters()) == 41_755_286
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert "layer2" in trained
    assert not trained & {"conv1", "layer1"}
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    load_backbone(model, tmp_path / "resnet50.pth")


def test_the_settings_are_torchvisions() -> None:
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    model, criterion = build_model(PUBLISHED), build_criterion(PUBLISHED)
    for expected, stages in (
        (theirs.rpn, (model.rpn, criterion.first)),
        (theirs.roi_heads, (model.roi_heads, criterion.second)),
    ):
        names = [n for n in vars(expected) if not n.startswith(("_mod", "_par", "training"))]
        assert len(names) > 6
        for stage in stages:
            for name in names:
                wanted, got = getattr(expected, name), getattr(stage, name)
                parts = [vars(x) if hasattr(x, "__dict__") else x for x in (wanted, got)]
                assert parts[0] == parts[1], name
    anchors = theirs.rpn.anchor_generator
    assert model.rpn.anchor_generator.sizes == anchors.sizes
    assert model.rpn.anchor_generator.aspect_ratios == anchors.aspect_ratios


def tiny(**changes: object) -> ModelConfig:
    values = {"backbone": "tiny", "hidden_dim": 32, "num_heads": 2, "num_classes": 6}
    return replace(CONFIG, **(values | {"feedforward_dim": 64} | changes))


def test_nothing_is_found_on_padding() -> None:
    torch.manual_seed(2)
    model = build_model(tiny(num_classes=91)).double().eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.normal_(0, 2.0)
        outputs = model(*padded(images()))
    assert outputs["image_sizes"] == SIZES
    results = postprocess(outputs, torch.tensor(SIZES))
    for (height, width), proposals, result in zip(
        SIZES, outputs["proposals"], results, strict=True
    ):
        assert len(result["boxes"]) > 0
        for boxes in (proposals, result["boxes"]):
            assert boxes.min() >= 0
            assert boxes[:, 2].max() == width
            assert boxes[:, 3].max() == height


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_every_trained_parameter_gets_a_gradient(counts: tuple[int, int]) -> None:
    torch.manual_seed(3)
    config = tiny()
    model = build_model(config).train()
    targets = [
        {"labels": torch.randint(1, 6, (n,)), "boxes": 0.2 + 0.4 * torch.rand(n, 4)} for n in counts
    ]
    whole, mask = padded(images())
    losses = build_criterion(config)(model(whole, mask), targets)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_box_without_area_is_left_out() -> None:
    torch.manual_seed(3)
    config = tiny()
    model, criterion = build_model(config).train(), build_criterion(config)
    outputs = model(*padded(images()))
    good = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    flat = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.0, 0.3], [0.2, 0.2, 0.1, -0.1]])
    bad = [good[0], {"labels": torch.tensor([2, 3, 4]), "boxes": flat}]
    torch.manual_seed(9)
    expected = criterion(outputs, good)
    torch.manual_seed(9)
    found = criterion(outputs, bad)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("label", [0, 6, -1])
def test_a_label_of_the_background_is_refused(label: int) -> None:
    config = tiny()
    outputs = build_model(config)(*padded(images()))
    target = {"labels": torch.tensor([label]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    with pytest.raises(ValueError, match=rf"labels: got {label}, expected 1\.\.5: column 0"):
        build_criterion(config)(outputs, [target, target])
    with pytest.raises(ValueError, match="targets: got 1, expected one for each of 2"):
        build_criterion(config)(outputs, [target])


def test_outputs_of_training_are_no_detections() -> None:
    model = build_model(tiny())
    with pytest.raises(ValueError, match="expected a model in evaluation mode"):
        postprocess(model.train()(*padded(images())), torch.tensor(SIZES))
    with pytest.raises(ValueError, match=r"sizes: got shape \(1, 2\), expected \(2, 2\)"):
        postprocess(model.eval()(*padded(images())), torch.tensor(SIZES[:1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_boxes_and_losses_in_full(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    config = tiny()
    model, criterion = build_model(config).train(), build_criterion(config)
    whole, mask = padded(images())
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    torch.manual_seed(9)
    expected = criterion(model(whole.float(), mask), targets)
    with torch.autocast("cpu", dtype):
        outputs = model(whole.float(), mask)
    stage = outputs["second_stage"]
    assert stage(outputs["proposals"])[0].dtype == torch.float32
    torch.manual_seed(9)
    losses = criterion(outputs, targets)
    assert outputs["anchors"][0].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert math.isclose(losses["loss"].item(), expected["loss"].item(), rel_tol=0.02)
    with torch.no_grad():
        cast = model.to(dtype).eval()(whole.to(dtype), mask)
    assert cast["class_logits"].isfinite().all()
    assert cast["proposals"][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"two_stage": True},
            "architecture: got faster_rcnn with box_refine=False, two_stage=True",
        ),
        ({"backbone": "resnet50", "dilation": True}, "dilation=True"),
        ({"classification": "focal"}, "classification: got focal with faster_rcnn"),
        ({"num_classes": 1}, "num_classes: got 1 with faster_rcnn, expected at least 2"),
    ],
)
def test_what_is_no_faster_rcnn_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
