"""Published weights: detectors' checkpoints and ImageNet backbones, in their own key names."""

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from model.backbone import ResNet
from model.faster_rcnn import FasterRCNN
from model.official_names import in_backbone, rename
from model.set_detector import SetDetector

# Some of our names in torchvision's Faster R-CNN to those of its file, which is older.
_OLD_FASTER_RCNN = [
    (r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
]


def load_official(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a published checkpoint's state dict (its `model` entry), in the names of the method's
    official implementation, or of torchvision's Faster R-CNN on COCO (`fasterrcnn_resnet50_fpn`,
    COCO_V1: its frozen norms have no epsilon, whatever file of these names is given).

    Raises `ValueError` naming every key that is missing, unexpected or of another shape, or whose
    aliases (one head under several names) differ; the model is then left as it was.
    """
    if not isinstance(model, SetDetector | FasterRCNN) or not isinstance(model.backbone, ResNet):
        raise ValueError(
            "load_official: got a model without a published checkpoint, "
            "expected a member of the DETR family or a Faster R-CNN, with a ResNet backbone"
        )
    if model.config.architecture == "faster_rcnn":
        state_dict = {
            rename(name, _OLD_FASTER_RCNN): value
            for name, value in state_dict.items()
            if not name.endswith("num_batches_tracked")
        }
    sources = {key: model.official_names(key) for key in model.state_dict()}
    _compare_keys(state_dict.keys(), {name for names in sources.values() for name in names})
    for key, (first, *aliases) in sources.items():
        for alias in aliases:
            if not torch.equal(state_dict[first], state_dict[alias]):
                raise ValueError(
                    f"checkpoint: got different values in {alias} and {first}, expected one head "
                    f"under both names (ours: {key})"
                )
    width = model.config.hidden_dim
    found = {
        key: _rows_of_in_proj(key, names[0], state_dict[names[0]], width)
        for key, names in sources.items()
    }
    if model.config.architecture == "faster_rcnn":
        _absorb_epsilon(model.backbone, found)
    _copy_into(model, found)


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Load ImageNet weights, a torchvision ResNet's or ResNeXt's state dict, into `model.backbone`.

    The classifier `fc` and batch counters are left out, and the offsets of deformable convolutions,
    which no such file has, stay as they are; otherwise as strict as `load_official`.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, ResNet):
        raise ValueError("load_backbone: got a model without a ResNet backbone, expected one")
    state_dict = {
        name: value
        for name, value in read_state_dict(path).items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    sources = {key: in_backbone(key) for key in backbone.state_dict() if ".offsets." not in key}
    _compare_keys(state_dict.keys(), set(sources.values()))
    _copy_into(backbone, {key: state_dict[name] for key, name in sources.items()})


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, of its `model` entry where it has one.

    Reads data only: a file that would run code when read is refused, with a `ValueError`.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles in other protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of another kind trips the reader in every way there is
        raise ValueError(
            f"{path}: {why_unread(error)}; expected a state dict by torch.save"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{path}: got no dict of tensors, expected a model's state dict")
    return content


OTHER_FORMAT = "it cannot be read; is it cut short, or of another format?"


def why_unread(error: Exception) -> str:
    """Why a file is no state dict. torch's own words would propose to run the code in it."""
    named = re.search(r"(?:GLOBAL|whose module) (\S+)", str(error))
    if named and isinstance(error, pickle.UnpicklingError):
        return f"it refers to {named[1]}, and nothing but tensors and plain values is read"
    if "zip archive" in str(error):
        return "the file is cut short or damaged"
    return "the file is empty" if isinstance(error, EOFError) else OTHER_FORMAT


def _absorb_epsilon(backbone: ResNet, found: dict[str, Tensor]) -> None:
    """Rescales the frozen norms' weights so that our epsilon has no effect: torchvision's Faster
    R-CNN was trained, and is evaluated, without one (`overwrite_eps(model, 0.0)` there)."""
    for name, module in backbone.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            key = f"backbone.{name}."
            variance = found[f"{key}running_var"].double()
            factor = ((variance + module.eps) / variance).sqrt()
            found[f"{key}weight"] = found[f"{key}weight"] * factor.to(found[f"{key}weight"])


def _rows_of_in_proj(key: str, name: str, value: Tensor, width: int) -> Tensor:
    """Our part of `value`: published attentions keep all input projections in one tensor, three, or
    five of row-column attention; the value's are the last."""
    if "in_proj_" not in name:
        return value
    rows = {
        "query_key": slice(0, 2 * width),
        "query": slice(0, width),
        "key": slice(width, 2 * width),
        "query_x": slice(0, width),
        "query_y": slice(width, 2 * width),
        "key_x": slice(2 * width, 3 * width),
        "key_y": slice(3 * width, 4 * width),
        "value": slice(-width, None),
    }
    return value[rows[key.split(".")[-2].removesuffix("_proj")]]


def _compare_keys(got: Iterable[str], expected: set[str]) -> None:
    missing, unexpected = sorted(expected - set(got)), sorted(map(_on_a_line, set(got) - expected))
    if missing or unexpected:
        raise ValueError(
            f"state dict: missing keys: {', '.join(missing) or 'none'}; "
            f"unexpected keys: {', '.join(unexpected) or 'none'}"
        )


def _on_a_line(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _copy_into(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Into those entries of the module that `values` names."""
    own = module.state_dict()
    wrong = [
        f"{key}: got {tuple(value.shape)}, expected {tuple(own[key].shape)}"
        for key, value in values.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"state dict: shapes differ: {'; '.join(wrong)}")
    module.load_state_dict({**own, **values})
