"""The detector's configuration: every number that changes the network or its loss."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

BackboneName = Literal[
    "resnet50",
    "resnet101",
    "resnext101_64x4d",
    "resnext101_32x8d",
    "resnext101_64x4d_dcn",
    "tiny",
    "tiny_dcn",
]
TINY = ("tiny", "tiny_dcn")
Architecture = Literal[
    "deformable_detr",
    "detr",
    "conditional_detr",
    "smca_detr",
    "dab_detr",
    "dab_deformable_detr",
    "sam_detr",
    "sam_multiscale_detr",
    "dino",
    "anchor_detr",
    "faster_rcnn",
]
DENSE: tuple[Architecture, ...] = (
    "detr",
    "conditional_detr",
    "smca_detr",
    "dab_detr",
    "anchor_detr",
)
"""Those that attend to every cell of one map."""
DENOISED: tuple[Architecture, ...] = ("dab_detr", "dab_deformable_detr")
"""Those that DN-DETR's denoising queries can train."""
DynamicScale = Literal["type1", "type2", "type3", "type4"]
Classification = Literal["focal", "focal_no_object", "softmax"]
NeckName = Literal["plain", "fpn", "bifpn"]


@dataclass(frozen=True)
class ModelConfig:
    """A detector and its loss; the defaults are the paper's ResNet-50 model (section 5).

    Raises `ValueError` for a value that no model can be built from.
    """

    architecture: Architecture = "deformable_detr"
    """`detr` is the baseline with dense attention over one map; fields that speak of levels,
    points, references or stages do not concern it, nor the others of `DENSE`. `faster_rcnn`,
    torchvision's with an FPN, takes `num_classes` (column 0 is the background), the backbone,
    `hidden_dim` (of the FPN), `feedforward_dim` (of the box head), `anchor_cells` and
    `sampled_proposals` alone."""
    num_classes: int = 91
    """Columns of the classification head. COCO's own category ids end at 90, hence 91. Training
    takes it from the data, whatever is given here."""
    num_queries: int = 300
    """Detections per image before the top ones are taken; in two-stage the proposals kept."""
    backbone: BackboneName = "resnet50"
    """`_dcn` has modulated deformable convolutions (DCNv2) for the 3x3 ones of stages C3 to C5;
    `tiny` is a small network for training from scratch on a CPU, `tiny_dcn` the same with them."""
    dilation: bool = False
    """DC5: the last stage keeps stride 16 and dilates its convolutions instead."""
    num_levels: int = 4
    """Feature maps L. 1 is the last stage alone; from 3 on stages C3-C5, then stride-2 ones."""
    neck: NeckName = "plain"
    """What joins the maps before the encoder (Table 2): nothing, an FPN or a BiFPN."""
    level_exchange: bool = True
    """Multi-scale attention in the encoder (Table 2, "MS attention"). Without it a token attends
    to its own level alone; queries of the decoder, which belong to no level, attend to all."""
    hidden_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    """Sampling points K for each head and level."""
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 1024
    dropout: float = 0.1
    box_refine: bool = False
    """Iterative bounding box refinement (A.4): each decoder layer corrects the boxes before it."""
    two_stage: bool = False
    """Queries come from the best-scoring encoder tokens (A.4). Implies refinement."""
    mixed_query_selection: bool = False
    """In two-stage, contents are learned, not taken from the proposals (DINO, section 3.4)."""
    look_forward_twice: bool = False
    """With refinement, a layer's boxes train the layer before, too (DINO, section 3.5)."""
    denoising_pairs: int = 0
    """In training, queries of noised ground truth, a positive and a negative one of each box, this
    many pairs for the image with the most boxes (DINO, section 3.3: 100). 0: none."""
    proposal_scale: float = 0.05
    """Side of a first-stage proposal on the finest level, relative to the image."""
    one_to_many_queries: int = 0
    """So many of the next best proposals are queries in training, too, several of which find the
    same object (hybrid matching, `model/family/one_to_many.py`: 1500, +1.7 AP). 0: none."""
    one_to_many_repeats: int = 6
    """Of these queries, how many are matched to each object."""
    anchor_cells: int = 8
    """Side of a Faster R-CNN's square anchors, in cells of their level (strides 4 to 64)."""
    sampled_proposals: int = 512
    """Proposals of an image that train a Faster R-CNN's second stage, at most."""
    dynamic_scale: DynamicScale = "type3"
    """What SMCA learns of the width of a head's Gaussian: nothing (`type1`), one scale (`type2`),
    one for x and one for y (`type3`), and a third for both together (`type4`)."""
    num_patterns: int = 0
    """Learned contents that each anchor of a DAB-DETR or an Anchor DETR is asked with, which makes
    as many queries of each; with 0 (DAB-DETR alone) the content starts at 0."""
    denoising_groups: int = 0
    """DN-DETR (arXiv:2203.01305): groups of noised ground truth that train beside the queries, 5 as
    published, and 0 for none. DAB-DETR gains 1.9 AP by them in 50 epochs, as published."""
    denoising_label_noise: float = 0.2
    """Probability that a denoising query is told a label at random."""
    denoising_box_noise: float = 0.4
    """How far a denoising query's centre moves in halves of its box's size, and its size in
    itself, at most; in contrastive denoising its sides move, in the same halves."""
    salient_gaussians: bool = False
    """SAM-DETR: attention falls with the distance from a head's salient point (SMCA)."""
    input_norm: bool = False
    """SAM-DETR on one map: a group norm behind the input projection. Published checkpoints of 12
    epochs have it, those of 50 do not."""
    activation_checkpointing: bool = False
    """Recompute the transformer layers in the backward pass: less memory, more time."""

    classification: Classification = "focal"
    """Sigmoid focal loss, or DETR's softmax cross entropy with a class for no object. SMCA has that
    class with the focal loss, too (`focal_no_object`): a column that is never a target."""
    no_object_weight: float = 0.1
    """Weight of queries without an object in softmax classification."""
    focal_alpha: float = 0.25
    class_weight: float = 2.0
    bbox_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    auxiliary_loss: bool = True
    """Supervise every decoder layer, not the last alone."""

    @property
    def refines(self) -> bool:
        """Whether each decoder layer has heads of its own and corrects the boxes."""
        return self.box_refine or self.two_stage

    @property
    def wants_targets(self) -> bool:
        """Whether the model is given the targets in training."""
        return self.denoising_groups > 0 or self.denoising_pairs > 0

    @property
    def proposes_classes(self) -> bool:
        """Whether the first stage tells classes apart."""
        return self.architecture == "dino"

    @property
    def area_eps(self) -> float:
        """Added to areas that a generalised IoU divides by, as the published code does."""
        anchors = self.architecture in ("dab_detr", "dab_deformable_detr", "dino")
        return 1e-6 if anchors else 0.0

    def __post_init__(self) -> None:
        for name in (
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
        ):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name, values in (
            ("architecture", Architecture),
            ("classification", Classification),
            ("dynamic_scale", DynamicScale),
        ):
            choices = get_args(values)
            _require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        names = get_args(BackboneName)
        _require(self, "backbone", self.backbone in names, f"one of {', '.join(names)}")
        necks = get_args(NeckName)
        _require(self, "neck", self.neck in necks, f"one of {', '.join(necks)}")
        _require(self, "num_levels", self.num_levels == 1 or self.num_levels >= 3, "1, or 3 and up")
        _require(
            self,
            "hidden_dim",
            self.hidden_dim % 32 == 0 and self.hidden_dim % self.num_heads == 0,
            f"a multiple of 32 (group norm) and of num_heads={self.num_heads}",
        )
        _require(self, "dropout", 0 <= self.dropout < 1, "0 <= dropout < 1")
        weight = self.no_object_weight
        _require(self, "no_object_weight", 0 < weight <= 1, "0 < no_object_weight <= 1")
        _require(self, "focal_alpha", 0 <= self.focal_alpha <= 1, "0 <= focal_alpha <= 1")
        _require(self, "proposal_scale", 0 < self.proposal_scale < 1, "0 < proposal_scale < 1")
        _require(self, "one_to_many_queries", self.one_to_many_queries >= 0, "0 or more")
        for name in ("weight", "cost"):
            for term in ("class", "bbox", "giou"):
                value = getattr(self, f"{term}_{name}")
                _require(self, f"{term}_{name}", 0 <= value < math.inf, "a finite number >= 0")
        if self.architecture in DENSE and (self.num_levels != 1 or self.refines):
            raise ValueError(
                f"architecture: got {self.architecture} with num_levels={self.num_levels}, "
                f"box_refine={self.box_refine}, two_stage={self.two_stage}, expected 1, False, "
                "False"
            )
        two_stage_cnn = self.architecture == "faster_rcnn"
        if two_stage_cnn and (self.refines or self.dilation or self.classification != "softmax"):
            raise ValueError(
                f"architecture: got faster_rcnn with box_refine={self.box_refine}, "
                f"two_stage={self.two_stage}, dilation={self.dilation}, "
                f"classification={self.classification}, expected False, False, False, softmax"
            )
        if two_stage_cnn and self.num_classes < 2:
            raise ValueError(
                f"num_classes: got {self.num_classes} with faster_rcnn, expected at least 2: "
                "the first is the background"
            )
        if self.architecture == "smca_detr" and self.dilation:
            raise ValueError(
                "dilation: got True with smca_detr, expected False: its centres are in cells of 32 "
                "pixels"
            )
        allowed = {
            "detr": ("focal", "softmax"),
            "smca_detr": ("focal_no_object",),
            "faster_rcnn": ("softmax",),
        }.get(self.architecture, ("focal",))
        if self.classification not in allowed:
            raise ValueError(
                f"classification: got {self.classification} with {self.architecture}, expected "
                f"{' or '.join(allowed)}"
            )
        self._check_anchors()
        self._check_sam()
        self._check_parts_of_dino()
        if self.num_levels == 1 and (self.neck != "plain" or not self.level_exchange):
            raise ValueError(
                f"neck, level_exchange: got {self.neck}, {self.level_exchange} with num_levels=1, "
                "expected plain, True: one level has none to be joined with"
            )
        if self.one_to_many_queries and not self.two_stage:
            raise ValueError(
                f"one_to_many_queries: got {self.one_to_many_queries} with two_stage=False, "
                "expected 0: they are proposals of a first stage"
            )
        if self.refines and not self.auxiliary_loss:
            raise ValueError(
                "auxiliary_loss: got False with box refinement, expected True: "
                "the boxes of earlier layers would never be trained"
            )

    def _check_anchors(self) -> None:
        for name in ("num_patterns", "denoising_groups"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        noise = self.denoising_label_noise
        _require(self, "denoising_label_noise", 0 <= noise <= 1, "0 <= denoising_label_noise <= 1")
        _require(self, "denoising_box_noise", 0 <= self.denoising_box_noise < math.inf, ">= 0")
        if self.architecture == "anchor_detr":
            _require(self, "num_patterns", self.num_patterns >= 1, "at least 1 with anchor_detr")
        elif self.num_patterns and self.architecture != "dab_detr":
            raise ValueError(
                f"num_patterns: got {self.num_patterns} with {self.architecture}, expected 0"
            )
        if self.denoising_groups and self.architecture not in DENOISED:
            raise ValueError(
                f"denoising_groups: got {self.denoising_groups} with {self.architecture}, "
                f"expected 0, or one of {', '.join(DENOISED)}"
            )
        if self.architecture == "dab_deformable_detr" and (self.two_stage or not self.box_refine):
            raise ValueError(
                f"architecture: got dab_deformable_detr with box_refine={self.box_refine}, "
                f"two_stage={self.two_stage}, expected True, False"
            )

    def _check_sam(self) -> None:
        one_map = self.architecture == "sam_detr"
        sam = one_map or self.architecture == "sam_multiscale_detr"
        if sam and (one_map != (self.num_levels == 1) or not self.box_refine or self.two_stage):
            raise ValueError(
                f"architecture: got {self.architecture} with num_levels={self.num_levels}, "
                f"box_refine={self.box_refine}, two_stage={self.two_stage}, expected "
                f"{'1' if one_map else '3 and up'}, True, False"
            )
        for name, fits in (("salient_gaussians", sam), ("input_norm", one_map)):
            if getattr(self, name) and not fits:
                raise ValueError(f"{name}: got True with {self.architecture}, expected False")

    def _check_parts_of_dino(self) -> None:
        dino, own = self.architecture == "dino", self.architecture == "deformable_detr"
        _require(self, "denoising_pairs", self.denoising_pairs >= 0, "at least 0")
        if dino and not self.two_stage:
            raise ValueError("two_stage: got False with dino, expected True")
        if dino and self.num_levels == 1:
            raise ValueError("num_levels: got 1 with dino, expected 3 and up")
        for name, needed in (
            ("mixed_query_selection", "two_stage"),
            ("look_forward_twice", "refines"),
        ):
            if getattr(self, name) and not (own and getattr(self, needed)):
                raise ValueError(
                    f"{name}: got True with {self.architecture} and two_stage={self.two_stage}, "
                    f"box_refine={self.box_refine}, expected False: it is a part of "
                    "deformable_detr with these, and dino has it always"
                )
        if self.denoising_pairs and not (dino or (own and self.two_stage)):
            raise ValueError(
                f"denoising_pairs: got {self.denoising_pairs} with {self.architecture} and "
                f"two_stage={self.two_stage}, expected 0, dino, or deformable_detr in two stages"
            )


def _require(config: ModelConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {getattr(config, name)!r}, expected {expected}")
