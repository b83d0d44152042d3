"""What no detector can be built from: values, and what does not go together.

Each check raises `ValueError` with one line: the field, what it has, what was expected.
"""

import math
import reprlib
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from model.config import ModelConfig

DENSE = ("detr", "conditional_detr", "smca_detr", "dab_detr", "anchor_detr")
"""Those that attend to every cell of one map, and refine no boxes."""
DENOISED = ("dab_detr", "dab_deformable_detr")
"""Those that DN-DETR's denoising queries can train."""
AT_LEAST_ONE = (
    "num_classes",
    "num_queries",
    "hidden_dim",
    "num_heads",
    "num_points",
    "encoder_layers",
    "decoder_layers",
    "feedforward_dim",
    "anchor_cells",
    "sampled_proposals",
    "one_to_many_repeats",
)
AT_LEAST_ZERO = ("one_to_many_queries", "num_patterns", "denoising_groups", "denoising_pairs")
OWNED = {
    "num_points": ("deformable_detr", "dab_deformable_detr", "sam_multiscale_detr", "dino"),
    "dynamic_scale": ("smca_detr",),
}
"""Fields that no other detector reads: changed there they would be an ablation of nothing."""
CLASSIFICATIONS = {
    "detr": ("focal", "softmax"),
    "smca_detr": ("focal_no_object",),
    "faster_rcnn": ("softmax",),
}
"""Of the detectors that have another one than the focal loss alone."""


def check_numbers(config: Any, section: str = "") -> None:
    """Raises `ValueError` where a field of a dataclass has a number that no computation takes: one
    that is not finite, or a whole one of 2**31 or more. section: goes before the field's name."""
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{section}{name}: got {value!r}, expected a finite number")
            if isinstance(number, int) and abs(number) >= 2**31:
                shown = reprlib.repr(value)
                raise ValueError(f"{section}{name}: got {shown}, expected less than 2**31")


def check(config: "ModelConfig") -> None:
    """Raises `ValueError` for a configuration that no detector can be built from."""
    check_numbers(config)
    _check_values(config)
    _check_owned(config)
    _check_levels_and_stages(config)
    _check_classification(config)
    _check_faster_rcnn(config)
    _check_anchors(config)
    _check_sam(config)
    _check_recipe_of_12_epochs(config)


def _check_values(config: "ModelConfig") -> None:
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            _require(config, name, getattr(config, name) in choices, f"one of {', '.join(choices)}")
    for name in AT_LEAST_ONE:
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in AT_LEAST_ZERO:
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    _require(
        config, "num_levels", config.num_levels == 1 or config.num_levels >= 3, "1, or 3 and up"
    )
    _require(
        config,
        "hidden_dim",
        config.hidden_dim % 32 == 0 and config.hidden_dim % config.num_heads == 0,
        f"a multiple of 32 (group norm) and of num_heads={config.num_heads}",
    )
    _require(config, "dropout", 0 <= config.dropout < 1, "0 <= dropout < 1")
    weight, noise = config.no_object_weight, config.denoising_label_noise
    _require(config, "no_object_weight", 0 < weight <= 1, "0 < no_object_weight <= 1")
    _require(config, "focal_alpha", 0 <= config.focal_alpha <= 1, "0 <= focal_alpha <= 1")
    _require(config, "proposal_scale", 0 < config.proposal_scale < 1, "0 < proposal_scale < 1")
    _require(config, "denoising_label_noise", 0 <= noise <= 1, "0 <= denoising_label_noise <= 1")
    _require(config, "denoising_box_noise", 0 <= config.denoising_box_noise < math.inf, ">= 0")
    for term in ("class", "bbox", "giou"):
        for kind in ("weight", "cost"):
            value = getattr(config, f"{term}_{kind}")
            _require(config, f"{term}_{kind}", 0 <= value < math.inf, "a finite number >= 0")


def _check_owned(config: "ModelConfig") -> None:
    for name, owners in OWNED.items():
        default = getattr(type(config), name)
        if config.architecture not in owners and getattr(config, name) != default:
            raise ValueError(
                f"{name}: got {getattr(config, name)!r} with {config.architecture}, expected "
                f"{default!r}: it is a part of {', '.join(owners)}"
            )


def _check_levels_and_stages(config: "ModelConfig") -> None:
    if config.architecture in DENSE and (config.num_levels != 1 or config.refines):
        raise ValueError(
            f"architecture: got {config.architecture} with num_levels={config.num_levels}, "
            f"box_refine={config.box_refine}, two_stage={config.two_stage}, expected 1, False, "
            "False"
        )
    if config.num_levels == 1 and (config.neck != "plain" or not config.level_exchange):
        raise ValueError(
            f"neck, level_exchange: got {config.neck}, {config.level_exchange} with num_levels=1, "
            "expected plain, True: one level has none to be joined with"
        )
    if config.refines and not config.auxiliary_loss:
        raise ValueError(
            "auxiliary_loss: got False with box refinement, expected True: "
            "the boxes of earlier layers would never be trained"
        )
    if config.architecture == "smca_detr" and config.dilation:
        raise ValueError(
            "dilation: got True with smca_detr, expected False: its centres are in cells of 32 "
            "pixels"
        )


def _check_classification(config: "ModelConfig") -> None:
    allowed = CLASSIFICATIONS.get(config.architecture, ("focal",))
    if config.classification not in allowed:
        raise ValueError(
            f"classification: got {config.classification} with {config.architecture}, expected "
            f"{' or '.join(allowed)}"
        )


def _check_faster_rcnn(config: "ModelConfig") -> None:
    if config.architecture != "faster_rcnn":
        return
    if config.refines or config.dilation:
        raise ValueError(
            f"architecture: got faster_rcnn with box_refine={config.box_refine}, "
            f"two_stage={config.two_stage}, dilation={config.dilation}, expected False, False, "
            "False"
        )
    if config.num_classes < 2:
        raise ValueError(
            f"num_classes: got {config.num_classes} with faster_rcnn, expected at least 2: "
            "the first is the background"
        )


def _check_anchors(config: "ModelConfig") -> None:
    if config.architecture == "anchor_detr":
        _require(config, "num_patterns", config.num_patterns >= 1, "at least 1 with anchor_detr")
    elif config.num_patterns and config.architecture != "dab_detr":
        raise ValueError(
            f"num_patterns: got {config.num_patterns} with {config.architecture}, expected 0"
        )
    if config.denoising_groups and config.architecture not in DENOISED:
        raise ValueError(
            f"denoising_groups: got {config.denoising_groups} with {config.architecture}, "
            f"expected 0, or one of {', '.join(DENOISED)}"
        )
    boxes = config.architecture == "dab_deformable_detr"
    if boxes and (config.two_stage or not config.box_refine):
        raise ValueError(
            f"architecture: got dab_deformable_detr with box_refine={config.box_refine}, "
            f"two_stage={config.two_stage}, expected True, False"
        )


def _check_sam(config: "ModelConfig") -> None:
    one_map = config.architecture == "sam_detr"
    sam = one_map or config.architecture == "sam_multiscale_detr"
    of_its_levels = one_map == (config.num_levels == 1)
    if sam and (not of_its_levels or not config.box_refine or config.two_stage):
        raise ValueError(
            f"architecture: got {config.architecture} with num_levels={config.num_levels}, "
            f"box_refine={config.box_refine}, two_stage={config.two_stage}, expected "
            f"{'1' if one_map else '3 and up'}, True, False"
        )
    for name, fits in (("salient_gaussians", sam), ("input_norm", one_map)):
        if getattr(config, name) and not fits:
            raise ValueError(f"{name}: got True with {config.architecture}, expected False")


def _check_recipe_of_12_epochs(config: "ModelConfig") -> None:
    """DINO's parts, of which Deformable DETR takes some, and hybrid matching."""
    dino, own = config.architecture == "dino", config.architecture == "deformable_detr"
    if dino and not config.two_stage:
        raise ValueError("two_stage: got False with dino, expected True")
    if dino and config.num_levels == 1:
        raise ValueError("num_levels: got 1 with dino, expected 3 and up")
    for name, needed in (
        ("mixed_query_selection", config.two_stage),
        ("look_forward_twice", config.refines),
    ):
        if getattr(config, name) and not (own and needed):
            raise ValueError(
                f"{name}: got True with {config.architecture} and two_stage={config.two_stage}, "
                f"box_refine={config.box_refine}, expected False: it is a part of "
                "deformable_detr with these, and dino has it always"
            )
    if config.denoising_pairs and not (dino or (own and config.two_stage)):
        raise ValueError(
            f"denoising_pairs: got {config.denoising_pairs} with {config.architecture} and "
            f"two_stage={config.two_stage}, expected 0, dino, or deformable_detr in two stages"
        )
    if config.one_to_many_queries and not config.two_stage:
        raise ValueError(
            f"one_to_many_queries: got {config.one_to_many_queries} with two_stage=False, "
            "expected 0: they are proposals of a first stage"
        )


def _require(config: "ModelConfig", name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, expected {expected}")
