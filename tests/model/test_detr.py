"""The whole network: shapes, precision, padding, gradients, start."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.criterion import build_criterion
from model.deformable_detr import DeformableDETR
from model.detr import build_model

MakeConfig = Callable[..., ModelConfig]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"box_refine": True},
    {"two_stage": True},
    {"num_levels": 1},
    {"num_levels": 3},
    {"num_levels": 5, "two_stage": True},
]


@pytest.mark.parametrize(
    ("changes", "total", "trained"),
    [
        ({}, 40_069_665, 39_847_265),
        ({"box_refine": True}, 40_849_660, 40_627_260),
        ({"two_stage": True}, 41_181_529, 40_959_129),
        ({"num_levels": 1}, 34_066_593, 33_844_193),
        ({"num_levels": 1, "dilation": True}, 34_066_593, 33_844_193),
        ({"backbone": "resnet101", "two_stage": True}, 60_121_433, 59_899_033),
    ],
)
def test_parameters_are_the_published_models(
    changes: dict[str, Any], total: int, trained: int
) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("changes", VARIANTS)
def test_outputs(changes: dict[str, Any], small_config: MakeConfig, batch: tuple) -> None:
    images, padding, _ = batch
    config = small_config(decoder_layers=3, **changes)
    outputs = build_model(config).eval()(images, padding)
    tokens = {1: 12, 3: 192 + 48 + 12, 4: 256, 5: 257}[config.num_levels]
    queries = min(9, tokens)
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == 3
    for layer in layers:
        assert layer["pred_logits"].shape == (2, queries, 5)
        assert layer["pred_boxes"].shape == (2, queries, 4)
        assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()
    assert ("enc_outputs" in outputs) == config.two_stage
    if config.two_stage:
        assert outputs["enc_outputs"]["pred_logits"].shape == (2, tokens, 5)
        assert outputs["enc_outputs"]["pred_boxes"].shape == (2, tokens, 4)


def test_without_auxiliary_loss_there_are_no_auxiliary_outputs(
    small_config: MakeConfig, batch: tuple
) -> None:
    images, padding, _ = batch
    assert "aux_outputs" not in build_model(small_config(auxiliary_loss=False))(images, padding)


@pytest.mark.parametrize("with_boxes", [True, False])
@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(
    changes: dict[str, Any], with_boxes: bool, small_config: MakeConfig, batch: tuple
) -> None:
    images, padding, targets = batch
    if not with_boxes:
        targets = [{name: x[:0] for name, x in target.items()} for target in targets]
    config = small_config(**changes)
    model = build_model(config).train()
    build_criterion(config)(model(images, padding), targets)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_frozen_stem_gets_none(batch: tuple) -> None:
    images, padding, targets = batch
    images, padding = images[:, :, :64, :64], padding[:, :64, :64]
    config = ModelConfig(encoder_layers=1, decoder_layers=1)
    model = build_model(config)
    build_criterion(config)(model(images, padding), targets)["loss"].backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert without == frozen
    assert {name.split(".")[1] for name in frozen} == {"conv1", "layer1"}


@pytest.mark.parametrize("changes", VARIANTS)
def test_equal_images_in_a_batch_are_seen_alike(
    changes: dict[str, Any], small_config: MakeConfig
) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(**changes)).eval().double()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    padding = torch.zeros(3, 64, 96, dtype=torch.bool)
    together = model(images, padding)
    for index in range(3):
        one = slice(index, index + 1)
        alone = model(images[one], padding[one])
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(together[name][one], alone[name], rtol=1e-9, atol=1e-12)


class PooledImages(nn.Module):
    """A backbone that looks at nothing but a cell's own pixels, so padding cannot leak in it."""

    def __init__(self, levels: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mixes = [torch.randn(width, 3, dtype=torch.float64) for _ in range(levels)]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [
            torch.einsum("cd,ndhw->nchw", mix, F.avg_pool2d(images, 8 * 2**level))
            for level, mix in enumerate(self.mixes)
        ]


@pytest.mark.parametrize("changes", [{}, {"box_refine": True}, {"two_stage": True}])
def test_padding_changes_nothing(changes: dict[str, Any], small_config: MakeConfig) -> None:
    torch.manual_seed(0)
    config = small_config(num_queries=5, **changes)
    model = build_model(config).eval().double()
    model.backbone, model.neck = PooledImages(4, config.hidden_dim), nn.Identity()
    with torch.no_grad():  # away from the start, where all heads and offsets are alike
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            if "memory_proj.bias" in name:
                parameter.zero_()  # a token that is masked scores as the bias of its class
            if "memory_norm.bias" in name:
                parameter.zero_()
    small = torch.randn(1, 3, 64, 128, dtype=torch.float64)
    alone = model(small, torch.zeros(1, 64, 128, dtype=torch.bool))
    images = torch.randn(2, 3, 192, 256, dtype=torch.float64)
    images[1] = 0
    images[1:, :, :64, :128] = small
    padding = torch.zeros(2, 192, 256, dtype=torch.bool)
    padding[1, 64:], padding[1, :, 128:] = True, True
    together = model(images, padding)
    for name in ("pred_logits", "pred_boxes"):
        # 1e-6: position and references are float32, and 1 / 64 in it differs from 0.25 / 16.
        torch.testing.assert_close(together[name][1:], alone[name], rtol=1e-5, atol=1e-6)
    unmasked = model(images, torch.zeros_like(padding))
    assert (unmasked["pred_boxes"][1:] - alone["pred_boxes"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
)
@pytest.mark.parametrize("changes", [{}, {"box_refine": True}])
def test_other_precisions(
    dtype: torch.dtype,
    tolerance: float,
    changes: dict[str, Any],
    small_config: MakeConfig,
    batch: tuple,
) -> None:
    images, padding, targets = batch
    torch.manual_seed(0)
    config = small_config(**changes)
    model = build_model(config).eval()
    expected = model(images, padding)
    outputs = model.to(dtype)(images, padding)
    assert outputs["pred_logits"].dtype == dtype
    assert outputs["pred_boxes"].dtype == torch.promote_types(dtype, torch.float32)
    for name in ("pred_logits", "pred_boxes"):
        error = (outputs[name].double() - expected[name].double()).abs().max()
        assert error < tolerance, name
    losses = build_criterion(config)(outputs, targets)
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"two_stage": True}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(
    changes: dict[str, Any], dtype: torch.dtype, small_config: MakeConfig, batch: tuple
) -> None:
    images, padding, targets = batch
    torch.manual_seed(0)
    config = small_config(**changes)
    model, criterion = build_model(config), build_criterion(config)
    expected = criterion(model(images, padding), targets)["loss"]
    with torch.autocast("cpu", dtype):
        outputs = model(images, padding)
    assert outputs["pred_boxes"].dtype == torch.float32
    loss = criterion(outputs, targets)["loss"]
    loss.backward()
    assert abs(loss - expected) < 0.05 * expected
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_references_are_not_rounded_under_autocast(small_config: MakeConfig, batch: tuple) -> None:
    images, padding, _ = batch
    model = build_model(small_config()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images, padding)
    # At the start the box head says 0 for the centre, so the centre is the reference itself.
    position = model.queries.embed.chunk(2, dim=-1)[0]
    centre = F.linear(position, model.queries.reference_points.weight).sigmoid()
    torch.testing.assert_close(outputs["pred_boxes"][0, :, :2], centre, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"two_stage": True}])
def test_checkpointing_changes_memory_only(
    changes: dict[str, Any], small_config: MakeConfig, batch: tuple
) -> None:
    images, padding, targets = batch
    results = []
    for activation_checkpointing in (False, True):
        config = small_config(
            activation_checkpointing=activation_checkpointing, dropout=0.1, **changes
        )
        torch.manual_seed(0)
        model = build_model(config).train()
        loss = build_criterion(config)(model(images, padding), targets)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def last_box_sum(model: DeformableDETR, batch: tuple) -> None:
    images, padding, _ = batch
    (model(images, padding)["pred_boxes"] ** 2).sum().backward()


def disturbed(config: ModelConfig) -> DeformableDETR:
    torch.manual_seed(0)
    model = DeformableDETR(config)
    for head in model.heads.boxes:
        nn.init.normal_(head.output.weight, std=0.1)
    return model


def test_refinement_blocks_the_gradient_of_earlier_boxes(
    small_config: MakeConfig, batch: tuple
) -> None:
    model = disturbed(small_config(decoder_layers=3, box_refine=True))
    last_box_sum(model, batch)
    trained = [head.output.weight.grad is not None for head in model.heads.boxes]
    assert trained == [False, False, True]
    assert model.queries.reference_points.weight.grad is not None


def test_without_refinement_references_learn_from_the_last_box(
    small_config: MakeConfig, batch: tuple
) -> None:
    model = disturbed(small_config(decoder_layers=3))
    last_box_sum(model, batch)
    assert model.queries.reference_points.weight.grad is not None
    assert model.queries.reference_points.weight.grad.abs().sum() > 0


def test_the_second_stage_does_not_train_the_first_ones_heads(
    small_config: MakeConfig, batch: tuple
) -> None:
    model = disturbed(small_config(two_stage=True))
    last_box_sum(model, batch)
    for heads in (model.heads.boxes, model.heads.classes):
        assert all(p.grad is None for p in heads[-1].parameters())
    assert model.queries.memory_proj.weight.grad is None
    assert model.queries.query_proj.weight.grad is not None


def test_the_start_without_two_stages(small_config: MakeConfig, batch: tuple) -> None:
    images, padding, _ = batch
    for refine in (False, True):
        model = build_model(small_config(box_refine=refine)).eval()
        outputs = model(images, padding)
        for layer in [outputs, *outputs["aux_outputs"]]:
            torch.testing.assert_close(
                layer["pred_boxes"][..., 2:], torch.full((2, 9, 2), -2.0).sigmoid()
            )
        for head in model.heads.classes:
            torch.testing.assert_close(head.bias.sigmoid(), torch.full((5,), 0.01))


def test_the_start_in_two_stages(small_config: MakeConfig, batch: tuple) -> None:
    images, padding, _ = batch
    outputs = build_model(small_config(two_stage=True)).eval()(images, padding)
    first = outputs["enc_outputs"]
    best = first["pred_logits"][..., 0].topk(9, dim=1).indices
    chosen = first["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    # Refinement starts at no change; a masked token's box of 1 comes back within 1e-5.
    torch.testing.assert_close(outputs["pred_boxes"], chosen, rtol=1e-4, atol=2e-5)
    cell = outputs["enc_outputs"]["pred_boxes"][0, 16 + 1]  # row 1, column 1 of 12 x 16 cells
    torch.testing.assert_close(cell, torch.tensor([1.5 / 16, 1.5 / 12, 0.1, 0.1]))
    coarse = outputs["enc_outputs"]["pred_boxes"][0, 192 + 2]  # row 0, column 2 of 6 x 8 cells
    torch.testing.assert_close(coarse, torch.tensor([2.5 / 8, 0.5 / 6, 0.2, 0.2]))


def test_one_pixel(small_config: MakeConfig) -> None:
    images, padding = torch.randn(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.bool)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}]
    for changes in VARIANTS:
        config = small_config(**changes)
        outputs = build_model(config).eval()(images, padding)
        loss = build_criterion(config)(outputs, targets)["loss"]
        assert loss.isfinite(), changes


def test_channels_last_images_give_the_same(small_config: MakeConfig, batch: tuple) -> None:
    images, padding, _ = batch
    model = build_model(small_config()).eval()
    expected = model(images, padding)["pred_boxes"]
    outputs = model(images.contiguous(memory_format=torch.channels_last), padding)
    torch.testing.assert_close(outputs["pred_boxes"], expected)
    for x in model.neck(model.backbone(images)):
        assert x.flatten(2).transpose(1, 2).is_contiguous()


class Crossings(TorchDispatchMode):
    """Notes every operation that touches a tensor off the GPU: each would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "cuda":
                self.found.append(str(func))
        return result


def pretend_on_gpu(model: nn.Module) -> None:
    """Replace all tensors by fake ones, which have a device but no memory."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    fake = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")
                    is_parameter = isinstance(x, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if is_parameter else fake


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_forward_never_waits_for_the_gpu(
    changes: dict[str, Any], small_config: MakeConfig
) -> None:
    model = build_model(small_config(**changes)).train()
    with FakeTensorMode():  # in which reading any number raises
        pretend_on_gpu(model)
        images = torch.zeros(2, 3, 96, 128, device="cuda")
        padding = torch.zeros(2, 96, 128, dtype=torch.bool, device="cuda")
        with Crossings() as crossings:
            outputs = model(images, padding)
    assert crossings.found == []
    assert outputs["pred_boxes"].device.type == "cuda"
