"""The model before its first step: seeded, then from given weights, whatever their classes."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model.config import TINY, ModelConfig
from model.detr import build_model
from model.weights import load_backbone, load_official, read_state_dict
from pipeline.checkpoint_store import load_model
from pipeline.config import RunConfig
from pipeline.engine import seed_step
from pipeline.errors import UserError

OUR_CLASS_HEAD = re.compile(r"^(heads|queries)\.classes\.(\d+\.)?(weight|bias)$")
PUBLISHED_CLASS_HEAD = re.compile(
    r"^(transformer\.(decoder\.|enc_out_)?)?class_embed\.(\d+\.)?(weight|bias)$"
)
# What denoising queries are told of their classes: a row for each, and one for none.
LABELS = re.compile(r"^(label_enc|(training_)?queries\.(\d+\.)?labels)\.weight$")
# A Faster R-CNN's heads, boxes for each class among them, are named alike in both.
BOTH_CLASS_HEADS = re.compile(r"^roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)$")


def initial_model(config: RunConfig, names: Sequence[str] = ()) -> tuple[nn.Module, str]:
    """The model with which a run starts, the same on every rank, and what the log says of it.

    names: of the classes by column, as in `Labels`; without them only their number is compared.
    Raises `UserError` for a file that is missing, is no checkpoint, or is of another architecture.
    """
    seed_step(config.seed, 0, 0)
    model = build_model(config.model)
    backbone, weights = config.init.backbone, config.init.weights
    if backbone:
        if not Path(backbone).is_file():
            raise UserError(f"weights {backbone!r}: no such file on this machine")
        try:
            load_backbone(model, Path(backbone))
        except ValueError as error:
            raise UserError(f"init.backbone {backbone}: {shortened(str(error))}") from None
    if weights:
        return model, load_weights(model, Path(weights), config.model, names)
    if not backbone and config.model.backbone not in TINY:
        return model, (
            f"{config.model.backbone} starts from random weights; --init.backbone FILE gives it "
            f"ImageNet's, which the published AP needs"
        )
    return model, ""


def load_weights(
    model: nn.Module, path: Path, config: ModelConfig, names: Sequence[str] = ()
) -> str:
    """Loads a checkpoint of ours or a published one into `model`, and says what it did.

    path: a run folder, a checkpoint folder, a model.pt, or a file in the names that the method was
    published with (torchvision's for Faster R-CNN). Class heads for another number of classes,
    or for classes of other `names` or in another order, stay as `model` has them, freshly
    initialised, those of the first stage too; everything else is loaded strictly. Published files
    carry no names. Raises `UserError` where it does not fit.
    """
    state, theirs, their_names = read_weights(path)
    if not any(is_class_head(name) for name in state):
        raise UserError(
            f"init.weights {path}: got {len(state)} tensors and no class head among them, expected "
            f"a checkpoint of ours or a published one of the method; a "
            f"backbone's weights are for --init.backbone"
        )
    try:
        others = their_names if names and their_names else ()
        fitted, replaced = with_own_class_heads(state, model, others, names)
        if is_ours(state):
            load_ours(model, fitted, theirs, config)
        else:
            load_official(model, fitted)
    except ValueError as error:
        raise UserError(f"init.weights {path}: {shortened(str(error))}") from None
    return f"init.weights {path}: " + (replaced or f"all {len(state)} tensors are loaded")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors of a checkpoint, and where it is one of ours the fields of its ModelConfig and
    the names of its classes by column."""
    if not path.exists():
        raise UserError(f"weights {str(path)!r}: no such file or folder on this machine")
    try:
        if path.is_file():
            state = read_state_dict(path)
            if not is_ours(state):
                return state, {}, []
        content = load_model(path)
        theirs = json.loads(content["config"])["model"]
    except (ValueError, RecursionError) as error:
        raise UserError(f"init.weights: {error}") from None
    except (KeyError, TypeError):
        raise UserError(f"init.weights {path}: its config names no model; is it damaged?") from None
    if not isinstance(theirs, dict):
        raise UserError(f"init.weights {path}: its config names no model; is it damaged?")
    labels = content.get("labels")
    theirs_by_column = labels.get("names", ()) if isinstance(labels, dict) else ()
    return content["model"], theirs, [str(name) for name in theirs_by_column]


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have our names, not published ones."""
    return any(OUR_CLASS_HEAD.match(name) or name.startswith("fpn.") for name in state)


def is_class_head(name: str) -> bool:
    """Whether a weight of this name has a row for each class, in our names or published ones."""
    patterns = (OUR_CLASS_HEAD, PUBLISHED_CLASS_HEAD, BOTH_CLASS_HEADS, LABELS)
    return any(pattern.match(name) for pattern in patterns)


def with_own_class_heads(
    state: Mapping[str, Tensor],
    model: nn.Module,
    their_names: Sequence[str] = (),
    names: Sequence[str] = (),
) -> tuple[dict[str, Tensor], str]:
    """`state` with the model's class heads in place of those that differ in their rows alone, or
    of all where `their_names` of the classes are known and others than `names`; and a sentence
    about them ("" where none differs)."""
    own = {name: x for name, x in model.state_dict().items() if is_class_head(name)}
    # Every class head of a DETR starts as a copy of one, so one stands for all, under any name.
    any_head = {_kind(name): value for name, value in own.items()}
    given = {n: x for n, x in state.items() if is_class_head(n) and _kind(n) in any_head}
    fresh = {name: own.get(name, any_head[_kind(name)]) for name in given}
    classes = [name for name in given if "bbox_pred" not in name and not LABELS.match(name)]
    rows = {len(given[name]) for name in classes if given[name].dim()}
    if len(rows) != 1:
        raise ValueError(f"class heads: got {sorted(rows)} classes, expected one number in all")
    renamed = bool(their_names) and list(their_names) != list(names)
    replaced = {
        name: fresh[name]
        for name, value in given.items()
        if value.shape[1:] == fresh[name].shape[1:] and (renamed or len(value) != len(fresh[name]))
    }
    if not replaced:
        return dict(state), ""
    theirs, ours = rows.pop(), len(fresh[classes[0]])
    why = f"class heads have {theirs} rows and this run's {ours}"
    if theirs == ours:
        why = f"classes are {_listed(their_names)} and this run's {_listed(names)}"
    return {**state, **replaced}, (
        f"re-initialised {', '.join(own)}, because the checkpoint's {why}; all other tensors are "
        f"loaded"
    )


def _kind(name: str) -> str:
    """Of a class head: "weight" or "bias", or what denoising queries are told."""
    return "labels" if LABELS.match(name) else name.rsplit(".", 1)[1]


def _listed(names: Sequence[str], most: int = 5) -> str:
    """Of columns that have a name."""
    named = [f"{name:.40}" for name in names if name]
    rest = len(named) - most
    return ", ".join(named[:most]) + (f" and {rest} more" if rest > 0 else "")


def load_ours(
    model: nn.Module, state: Mapping[str, Tensor], theirs: Mapping[str, Any], config: ModelConfig
) -> None:
    """Raises ValueError with the fields of ModelConfig that differ where `state` does not fit."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != expected:
        wanted = dataclasses.asdict(config)
        different = [
            f"model.{name}: got {theirs.get(name)!r}, expected {value!r}"
            for name, value in wanted.items()
            if name != "num_classes" and theirs.get(name) != value
        ]
        raise ValueError(f"another architecture; {'; '.join(different)}")
    model.load_state_dict(state)


def shortened(message: str, most: int = 3) -> str:
    """The message with every list in it cut after its first entries."""
    parts = []
    for part in message.split("; "):
        entries = part.split(", ")
        rest = len(entries) - most
        cut = [*entries[:most], f"and {rest} more"] if rest > 1 else entries
        parts.append(", ".join(cut))
    rest = len(parts) - most
    return "; ".join([*parts[:most], f"and {rest} more"] if rest > 1 else parts)
