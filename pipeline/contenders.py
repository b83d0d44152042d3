"""What `benchmark-step` times: our model with each operator, and the same detector by others.

All get the same images, targets, rates and optimizer. N batch, Q queries, L levels, K points.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from cuda_ops import reference
from cuda_ops.contenders import grid_sample_attention
from model import attention
from model.criterion import Targets, build_criterion
from model.detr import build_model
from model.parameters import parameter_groups
from pipeline.config import RunConfig
from pipeline.engine import AUTOCAST, build_engine, build_optimizer, start_process_group
from pipeline.errors import UserError

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """One model with its loss and its optimizer: the four calls that make a step."""

    name: str
    what: str
    """What exactly runs, for the report."""
    groups: list[list[nn.Parameter]]
    """Its trained parameters, by learning rate."""
    predict: Callable[[Tensor, Tensor, Targets], Any]
    """(images [N, 3, H, W], padding_mask [N, H, W], targets) to predictions."""
    score: Callable[[Any, Targets], Tensor]
    """(predictions, targets) to the weighted loss."""
    backward: Callable[[Tensor], None]
    update: Callable[[], None]
    """Clips, steps, and clears the gradients."""
    operator: Operator = attention.fused_deformable_attention
    """The deformable attention that our model calls."""


def require(name: str, config: RunConfig) -> None:
    """Raises `UserError` for a contender that is unknown, not installed, or has no such model."""
    key, _, path = name.partition("=")
    if name in OURS:
        return
    if name == "deepspeed":
        _require_module(name)
    elif name == "transformers":
        _require_resnet(name, config, "resnet50")
        if config.model.dilation:
            raise UserError("contender transformers: its ResNet has no dilation; leave it out")
        for cost in ("class_cost", "bbox_cost", "giou_cost", "bbox_weight", "giou_weight"):
            value = getattr(config.model, cost)
            if value != int(value):
                raise UserError(f"contender transformers: got model.{cost} {value}, expected whole")
        _require_module(name)
    elif key == "official" and path:
        _require_resnet(key, config, "resnet50", "resnet101")
        _import_official(Path(path))
    else:
        known = ", ".join([*OURS, "deepspeed", "transformers", "official=PATH"])
        raise UserError(f"unknown contender {name!r}: expected one of {known}")


def _require_module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"contender {name}: not installed; pip install {name}, or leave it out")


def _require_resnet(name: str, config: RunConfig, *backbones: str) -> None:
    if config.model.backbone not in backbones:
        raise UserError(
            f"contender {name}: got the backbone {config.model.backbone} of {config.recipe}, "
            f"expected {' or '.join(backbones)}; leave it out of --beside"
        )


def build_contender(name: str, config: RunConfig, device: torch.device) -> Contender:
    """The contender `name` in the precision of `config.engine`, its weights seeded.

    Raises `UserError` as `require` does.
    """
    require(name, config)
    torch.manual_seed(config.seed)
    if name.startswith("official="):
        return _official(Path(name.removeprefix("official=")), config, device)
    if name == "transformers":
        return _transformers(config, device)
    if name == "deepspeed":
        return _deepspeed(config, device)
    what, operator = OURS[name]
    if name == "compile":
        torch.compiler.reset()  # a graph for the sizes to come, not for those before
    model = build_model(config.model).to(device).train()
    criterion = build_criterion(config.model).to(device)
    forward: Callable[..., Any] = torch.compile(model) if name == "compile" else model

    def predict(images: Tensor, padding_mask: Tensor, targets: Targets) -> Any:
        with _autocast(config, device):
            return forward(images, padding_mask, *_told(config, targets))

    def score(outputs: Any, targets: Targets) -> Tensor:
        loss: Tensor = criterion(outputs, targets)["loss"]
        return loss

    return _plain(
        name, what, model, build_optimizer(model, config), config, predict, score, operator
    )


def _plain(
    name: str,
    what: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    predict: Callable[[Tensor, Tensor, Targets], Any],
    score: Callable[[Any, Targets], Tensor],
    operator: Operator = attention.fused_deformable_attention,
) -> Contender:
    """A contender whose gradient is clipped and stepped by torch alone."""

    def backward(loss: Tensor) -> None:
        loss.backward()

    def update() -> None:
        if config.optimizer.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    groups = [group["params"] for group in optimizer.param_groups]
    return Contender(name, what, groups, predict, score, backward, update, operator)


def _told(config: RunConfig, targets: Targets) -> tuple[Any, ...]:
    """What our model's forward takes beside the images in training."""
    return (targets,) if config.model.wants_targets else ()


def _autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    dtype = AUTOCAST.get(config.engine.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _grid_sample(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """`grid_sample_attention` for 4-d references, too: offsets of boxes become pixels."""
    if points.shape[-1] == 4:
        sizes = offsets.new_tensor([(w, h) for h, w in shapes])[:, None]  # [L, 1, 2]
        half_boxes = points[:, :, None, :, None, 2:] / 2
        offsets = offsets / offsets.shape[4] * half_boxes * sizes
    return grid_sample_attention(value, shapes, points[..., :2], offsets, logits)


OURS: dict[str, tuple[str, Operator]] = {
    "ours": ("our model, the fused operator", attention.fused_deformable_attention),
    "compile": (
        "our model by torch.compile (default mode, static shapes); the loss is not compiled",
        attention.fused_deformable_attention,
    ),
    "reference": (
        "our model, the operator's definition in PyTorch",
        reference.fused_deformable_attention,
    ),
    "grid_sample": (
        "our model, attention by grid_sample for each level, as transformers writes it",
        _grid_sample,
    ),
}


def _deepspeed(config: RunConfig, device: torch.device) -> Contender:
    """The trainer's own engine, in a process group of one."""
    start_process_group(device)
    model = build_model(config.model).to(device).train()
    engine = build_engine(model, config, steps_per_epoch=10**6)  # the rates stay as they start
    criterion = build_criterion(config.model).to(device)

    def predict(images: Tensor, padding_mask: Tensor, targets: Targets) -> Any:
        return engine(images, padding_mask, *_told(config, targets))

    def score(outputs: Any, targets: Targets) -> Tensor:
        loss: Tensor = criterion(outputs, targets)["loss"]
        return loss

    what = f"our model in the trainer's DeepSpeed engine, ZeRO stage {config.engine.zero_stage}"
    groups = list(parameter_groups(model).values())
    return Contender("deepspeed", what, groups, predict, score, engine.backward, engine.step)


def _transformers(config: RunConfig, device: torch.device) -> Contender:
    """`DeformableDetrForObjectDetection` of the same size, from its config alone."""
    from transformers import (
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        ResNetConfig,
        __version__,
    )

    ours = config.model
    stages = ["stage2", "stage3", "stage4"] if ours.num_levels > 1 else ["stage4"]
    theirs = DeformableDetrConfig(
        backbone_config=ResNetConfig(out_features=stages),
        num_feature_levels=ours.num_levels,
        num_labels=ours.num_classes,
        num_queries=ours.num_queries,
        two_stage_num_proposals=ours.num_queries,
        d_model=ours.hidden_dim,
        encoder_layers=ours.encoder_layers,
        decoder_layers=ours.decoder_layers,
        encoder_attention_heads=ours.num_heads,
        decoder_attention_heads=ours.num_heads,
        encoder_n_points=ours.num_points,
        decoder_n_points=ours.num_points,
        encoder_ffn_dim=ours.feedforward_dim,
        decoder_ffn_dim=ours.feedforward_dim,
        dropout=ours.dropout,
        attention_dropout=ours.dropout,
        activation_dropout=ours.dropout,
        auxiliary_loss=ours.auxiliary_loss,
        with_box_refine=ours.refines,
        two_stage=ours.two_stage,
        tie_word_embeddings=not ours.refines,
        focal_alpha=ours.focal_alpha,
        class_cost=int(ours.class_cost),
        bbox_cost=int(ours.bbox_cost),
        giou_cost=int(ours.giou_cost),
        bbox_loss_coefficient=int(ours.bbox_weight),
        giou_loss_coefficient=int(ours.giou_weight),
    )
    model = DeformableDetrForObjectDetection(theirs)
    if ours.refines:  # its checkpoints share these, a fresh model has copies that nothing trains
        model.model.decoder.bbox_embed = model.bbox_embed
    if ours.two_stage:
        model.model.decoder.class_embed = model.class_embed
    # Its own rule means to freeze the stem and the first stage, but spells the stages otherwise
    # than its ResNet does, and would freeze the whole backbone.
    for name, parameter in model.named_parameters():
        if "backbone" in name:
            parameter.requires_grad_(any(f"encoder.stages.{i}." in name for i in (1, 2, 3)))
    model = model.to(device).train()
    loss_function = model.loss_function
    # Its forward calls the loss last; this keeps what it would be given, to be timed by itself.
    model.loss_function = lambda *inputs: (None, inputs, None)

    def labels(targets: Targets) -> list[dict[str, Tensor]]:
        return [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]

    def predict(images: Tensor, padding_mask: Tensor, targets: Targets) -> Any:
        with _autocast(config, device):
            outputs = model(images, pixel_mask=(~padding_mask).long(), labels=labels(targets))
        return outputs.loss_dict

    def score(inputs: Any, targets: Targets) -> Tensor:
        wide = [x.float() if isinstance(x, Tensor) else x for x in inputs]
        return loss_function(*wide)[0]

    what = (
        f"DeformableDetrForObjectDetection of transformers {__version__}, "
        f"attention among queries by {theirs._attn_implementation}; its loss (classification "
        "weighs 1, no first-stage terms) outside of autocast on predictions cast to float32; "
        "backbone stages 2 to 4 trained as in ours"
    )
    optimizer = build_optimizer(model, config)
    return _plain("transformers", what, model, optimizer, config, predict, score)


def _official(path: Path, config: RunConfig, device: torch.device) -> Contender:
    """A checkout of fundamentalvision/Deformable-DETR whose extension is built."""
    models, misc = _import_official(path)
    ours = config.model
    arguments = argparse.Namespace(
        dataset_file="coco",
        device=str(device),
        masks=False,
        frozen_weights=None,
        backbone=ours.backbone,
        dilation=ours.dilation,
        lr_backbone=config.optimizer.backbone_lr,
        position_embedding="sine",
        num_feature_levels=ours.num_levels,
        hidden_dim=ours.hidden_dim,
        nheads=ours.num_heads,
        enc_layers=ours.encoder_layers,
        dec_layers=ours.decoder_layers,
        enc_n_points=ours.num_points,
        dec_n_points=ours.num_points,
        dim_feedforward=ours.feedforward_dim,
        dropout=ours.dropout,
        num_queries=ours.num_queries,
        with_box_refine=ours.refines,
        two_stage=ours.two_stage,
        aux_loss=ours.auxiliary_loss,
        set_cost_class=ours.class_cost,
        set_cost_bbox=ours.bbox_cost,
        set_cost_giou=ours.giou_cost,
        cls_loss_coef=ours.class_weight,
        bbox_loss_coef=ours.bbox_weight,
        giou_loss_coef=ours.giou_weight,
        focal_alpha=ours.focal_alpha,
    )
    # On any but the main process the backbone is not downloaded.
    with replaced(importlib.import_module("models.backbone"), "is_main_process", lambda: False):
        model, criterion, _ = models.build_model(arguments)
    model = model.to(device).train()

    def predict(images: Tensor, padding_mask: Tensor, targets: Targets) -> Any:
        with _autocast(config, device):
            return model(misc.NestedTensor(images, padding_mask))

    def score(outputs: Any, targets: Targets) -> Tensor:
        losses = criterion(_in_float32(outputs), targets)
        weights = criterion.weight_dict
        return torch.stack([losses[k] * weights[k] for k in losses if k in weights]).sum()

    what = (
        "the official checkout with its own extension; under autocast the extension, which has no "
        "16-bit kernels, gets float32; its loss outside of autocast on predictions cast to float32"
    )
    optimizer = build_optimizer(model, config)
    return _plain("official", what, model, optimizer, config, predict, score)


@functools.cache
def _import_official(path: Path) -> tuple[Any, Any]:
    """Its modules `models` and `util.misc`, the extension called in float32 under autocast."""
    if not (path / "models" / "deformable_detr.py").is_file():
        raise UserError(
            f"official={path}: expected a checkout of fundamentalvision/Deformable-DETR"
        )
    sys.path.insert(0, str(path.resolve()))
    try:
        # It reads the version's first three characters as a number and takes 0.29 for 0.2.
        with replaced(torchvision, "__version__", "0.9.0"):
            models, misc = (importlib.import_module(name) for name in ("models", "util.misc"))
        calls = importlib.import_module("models.ops.modules.ms_deform_attn")
    except ImportError as error:
        raise UserError(
            f"official={path}: cannot be imported ({error}); "
            f"build its extension in {path / 'models' / 'ops'} with this Python"
        ) from None
    finally:
        sys.path.remove(str(path.resolve()))
    calls.MSDeformAttnFunction = _InFloat32(calls.MSDeformAttnFunction)  # type: ignore[attr-defined]
    return models, misc


class _InFloat32:
    """An autograd function whose floating inputs become float32."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def apply(self, *inputs: Any) -> Tensor:
        return self.function.apply(*_in_float32(list(inputs)))


def _in_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_float32(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_in_float32(x) for x in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
