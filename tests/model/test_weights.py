from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from model.backbone import DeformableNormConv2d
from model.config import ModelConfig
from model.deformable_detr import DeformableDETR
from model.weights import load_backbone, load_official, read_state_dict

SMALL: dict[str, Any] = {
    "num_classes": 7,
    "num_queries": 6,
    "hidden_dim": 32,
    "num_heads": 2,
    "feedforward_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"box_refine": True},
    "two_stage": {"two_stage": True},
    "single_scale": {"num_levels": 1},
    "single_scale_dc5": {"num_levels": 1, "dilation": True},
}


def published(refine: bool, two_stage: bool, levels: int) -> dict[str, Tensor]:
    """A checkpoint with random numbers, in the published names and shapes for `SMALL`."""
    c, f, classes, heads, points = 32, 48, 7, 2, 4
    shapes: dict[str, tuple[int, ...]] = {"transformer.level_embed": (levels, c)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def deformable(name: str) -> None:
        linear(f"{name}.sampling_offsets", heads * levels * points * 2, c)
        linear(f"{name}.attention_weights", heads * levels * points, c)
        linear(f"{name}.value_proj", c, c)
        linear(f"{name}.output_proj", c, c)

    for index in range(2):
        layer = f"transformer.encoder.layers.{index}"
        deformable(f"{layer}.self_attn")
        linear(f"{layer}.linear1", f, c)
        linear(f"{layer}.linear2", c, f)
        norm(f"{layer}.norm1", c)
        norm(f"{layer}.norm2", c)
    for index in range(3):
        layer = f"transformer.decoder.layers.{index}"
        deformable(f"{layer}.cross_attn")
        shapes[f"{layer}.self_attn.in_proj_weight"] = (3 * c, c)
        shapes[f"{layer}.self_attn.in_proj_bias"] = (3 * c,)
        linear(f"{layer}.self_attn.out_proj", c, c)
        linear(f"{layer}.linear1", f, c)
        linear(f"{layer}.linear2", c, f)
        for number in (1, 2, 3):
            norm(f"{layer}.norm{number}", c)
    if two_stage:
        linear("transformer.enc_output", c, c)
        norm("transformer.enc_output_norm", c)
        linear("transformer.pos_trans", 2 * c, 2 * c)
        norm("transformer.pos_trans_norm", 2 * c)
    else:
        linear("transformer.reference_points", 2, c)
        shapes["query_embed.weight"] = (6, 2 * c)
    channels = [512, 1024, 2048] if levels > 1 else [2048]
    for level in range(levels):
        extra = level >= len(channels)
        inputs, side = (2048, 3) if extra else (channels[level], 1)
        shapes[f"input_proj.{level}.0.weight"] = (c, inputs, side, side)
        shapes[f"input_proj.{level}.0.bias"] = (c,)
        norm(f"input_proj.{level}.1", c)
    copies = 4 if two_stage else 3
    for index in range(copies):
        linear(f"class_embed.{index}", classes, c)
        linear(f"bbox_embed.{index}.layers.0", c, c)
        linear(f"bbox_embed.{index}.layers.1", c, c)
        linear(f"bbox_embed.{index}.layers.2", 4, c)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}

    for name in list(state):
        if name.startswith(("class_embed.", "bbox_embed.")):
            kind, index, rest = name.split(".", 2)
            if not refine:
                state[name] = state[f"{kind}.0.{rest}"]
            elif kind == "bbox_embed" or two_stage:
                state[f"transformer.decoder.{name}"] = state[name]
    for name, value in torchvision.models.resnet50(weights=None).state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            state[f"backbone.0.body.{name}"] = torch.randn_like(value)
    return state


def case(name: str) -> tuple[DeformableDETR, dict[str, Tensor]]:
    config = ModelConfig(**(SMALL | VARIANTS[name]))
    torch.manual_seed(0)
    return DeformableDETR(config), published(config.refines, config.two_stage, config.num_levels)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_loaded(name: str) -> None:
    model, state = case(name)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    load_official(model, state)
    ours = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in ours.values())
    by_storage = {value.data_ptr(): value for value in state.values()}
    # A sum over all numbers: each was taken once, whatever it is called.
    taken = sum(float(x.double().sum()) for x in ours.values())
    assert taken == pytest.approx(sum(float(x.double().sum()) for x in by_storage.values()))
    assert sum(x.numel() for x in ours.values()) == sum(x.numel() for x in by_storage.values())


def test_places_that_are_easily_confused() -> None:
    model, state = case("two_stage")
    load_official(model, state)
    layer, name = model.decoder[1], "transformer.decoder.layers.1"
    pairs = [
        (layer.cross_norm.weight, f"{name}.norm1.weight"),
        (layer.self_norm.weight, f"{name}.norm2.weight"),
        (layer.feedforward.norm.weight, f"{name}.norm3.weight"),
        (layer.self_attention.output_proj.bias, f"{name}.self_attn.out_proj.bias"),
        (layer.cross_attention.output_proj.bias, f"{name}.cross_attn.output_proj.bias"),
        (model.encoder[0].feedforward.norm.bias, "transformer.encoder.layers.0.norm2.bias"),
        (model.heads.boxes[3].output.bias, "bbox_embed.3.layers.2.bias"),
        (model.heads.boxes[2].hidden[2].bias, "bbox_embed.2.layers.1.bias"),
        (
            model.backbone.layer2[0].downsample.weight,
            "backbone.0.body.layer2.0.downsample.0.weight",
        ),
        (
            model.backbone.layer4[2].conv3.norm.running_var,
            "backbone.0.body.layer4.2.bn3.running_var",
        ),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours, state[theirs]), theirs
    packed = state[f"{name}.self_attn.in_proj_weight"]
    assert torch.equal(layer.self_attention.query_key_proj.weight, packed[:64])
    assert torch.equal(layer.self_attention.value_proj.weight, packed[64:])


def drop(state: dict[str, Tensor]) -> None:
    del state["transformer.encoder.layers.1.norm2.bias"]
    del state["transformer.decoder.bbox_embed.0.layers.0.weight"]


def add(state: dict[str, Tensor]) -> None:
    state["class_embed.9.weight"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["input_proj.3.0.weight"] = torch.zeros(32, 1024, 3, 3)


def part(state: dict[str, Tensor]) -> None:
    state["transformer.decoder.bbox_embed.1.layers.2.bias"] = torch.zeros(4)


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (
            drop,
            [
                "missing keys: transformer.decoder.bbox_embed.0.layers.0.weight, "
                "transformer.encoder.layers.1.norm2.bias; unexpected keys: none"
            ],
        ),
        (add, ["missing keys: none; unexpected keys: class_embed.9.weight"]),
        (reshape, ["neck.levels.3.0.weight", "(32, 1024, 3, 3)", "(32, 2048, 3, 3)"]),
        (part, ["transformer.decoder.bbox_embed.1.layers.2.bias", "bbox_embed.1.layers.2.bias"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(
    spoil: Callable[[dict[str, Tensor]], None], messages: list[str]
) -> None:
    model, state = case("refine")
    spoil(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"got|missing") as error:
        load_official(model, state)
    for message in messages:
        assert message in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_variants_checkpoint_is_refused() -> None:
    model, _ = case("base")
    _, other = case("two_stage")
    with pytest.raises(ValueError, match=r"missing keys: query_embed\.weight.*enc_output\.bias"):
        load_official(model, other)


def test_a_model_without_published_weights_is_refused() -> None:
    tiny = DeformableDETR(ModelConfig(**(SMALL | {"backbone": "tiny"})))
    with pytest.raises(ValueError, match="expected a member of the DETR family"):
        load_official(tiny, {})
    with pytest.raises(ValueError, match="without a ResNet backbone"):
        load_backbone(tiny, "weights.pth")


BACKBONES: list[tuple[str, dict[str, Any]]] = [
    ("resnet50", {}),
    ("resnet50", {"num_levels": 1}),
    ("resnet50", {"num_levels": 1, "dilation": True}),
    ("resnet101", {}),
    ("resnext101_64x4d", {}),
    ("resnext101_32x8d", {}),
]


@pytest.mark.parametrize(("name", "changes"), BACKBONES)
def test_a_loaded_backbone_computes_what_torchvision_does(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Also the proof that folding the frozen norm into its convolution changes nothing."""
    net = random_torchvision(name, "dilation" in changes)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    model = DeformableDETR(ModelConfig(**(SMALL | changes), backbone=name))  # type: ignore[arg-type]
    load_backbone(model, tmp_path / "weights.pth")
    model, net = model.double(), net.double()
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    found = model.backbone(images)
    x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
    maps = []
    for stage in (net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    for got, expected in zip(found, maps[-len(found) :], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def random_torchvision(name: str, dilation: bool = False) -> Any:
    torch.manual_seed(2)
    net = getattr(torchvision.models, name)(
        weights=None, replace_stride_with_dilation=[False, False, dilation]
    ).eval()
    with torch.no_grad():
        for buffer_name, buffer in net.named_buffers():
            if "running" in buffer_name:
                buffer.uniform_(0.5, 1.5)
    return net


def test_a_deformable_backbone_takes_plain_weights(tmp_path: Path) -> None:
    """With masks of one and no offsets it computes what the plain network does; with offsets, each
    deformed convolution is torchvision's followed by the norm."""
    net = random_torchvision("resnext101_64x4d")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    model = DeformableDETR(ModelConfig(**SMALL, backbone="resnext101_64x4d_dcn"))
    load_backbone(model, tmp_path / "weights.pth")
    backbone, net = model.backbone.double(), net.double()
    deformable = [m for m in backbone.modules() if isinstance(m, DeformableNormConv2d)]
    assert len(deformable) == 4 + 23 + 3  # the blocks of C3, C4 and C5
    with torch.no_grad():
        for module in deformable:
            module.offsets.bias[18:] = 50.0  # masks of sigmoid(50) = 1
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
    for got, stage in zip(backbone(images), (net.layer2, net.layer3, net.layer4), strict=True):
        x = stage(x)
        torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-10)

    block, module = net.layer2[0], backbone.layer2[0].conv2
    with torch.no_grad():
        module.offsets.weight.normal_(std=0.05)
        module.offsets.bias.normal_()
    x = torch.randn(1, 512, 9, 11, dtype=torch.float64)
    numbers = module.offsets(x)
    expected = block.bn2(
        torchvision.ops.deform_conv2d(
            x, numbers[:, :18], block.conv2.weight, stride=2, padding=1,
            mask=numbers[:, 18:].sigmoid(),
        )
    )  # fmt: skip
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-10)


def test_a_backbone_of_another_depth_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    model, _ = case("base")
    with pytest.raises(ValueError, match=r"missing keys: layer1\.0\.bn3\.bias"):
        load_backbone(model, tmp_path / "resnet18.pth")


class Harm:
    def __reduce__(self) -> tuple:
        return (print, ("this must not run",))


def test_files_that_are_no_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {"harm": {"model": Harm()}, "list": [1, 2], "text": {"a": "b"}}.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "noise").write_bytes(b"\x00\x01 no checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "page").write_bytes(b"hello, I am a page of a web server")
    (tmp_path / "short").write_bytes((tmp_path / "list").read_bytes()[:300])
    reasons = {
        "harm": "it refers to", "list": "got no dict", "text": "got no dict", "empty": "is empty",
        "noise": "cannot be read", "page": "cannot be read", "short": "cut short or damaged",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match="expected a") as error:
            read_state_dict(tmp_path / name)
        assert f"{name}: " in str(error.value)
        assert reason in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's advice to run what is in the file
        assert "\n" not in str(error.value)
    assert "must not run" not in capsys.readouterr().out


def test_a_published_file_keeps_its_weights_under_model(tmp_path: Path) -> None:
    content = {"model": {"a": torch.ones(2)}, "args": Namespace(lr=0.1), "epoch": 49}
    torch.save(content, tmp_path / "checkpoint.pth")
    assert torch.equal(read_state_dict(tmp_path / "checkpoint.pth")["a"], torch.ones(2))
