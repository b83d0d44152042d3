"""The detector's configuration: every number that changes the network or its loss."""

from dataclasses import dataclass
from typing import Literal

from model.config_checks import check

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
    points, references or stages do not concern it, nor the others with one map. `faster_rcnn`,
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
    """In two-stage, contents are learned, not taken from the proposals (DINO, section 3.4:
    +0.5 AP in 12 epochs)."""
    look_forward_twice: bool = False
    """With refinement, a layer's boxes train the layer before, too (DINO, section 3.5: +0.4 AP
    in 12 epochs)."""
    denoising_pairs: int = 0
    """In training, queries of noised ground truth, a positive and a negative one of each box, this
    many pairs for the image with the most boxes (DINO, section 3.3: 100, +0.5 AP in 12 epochs). 0:
    none."""
    proposal_scale: float = 0.05
    """Side of a first-stage proposal on the finest level, relative to the image."""
    one_to_many_queries: int = 0
    """So many of the next best proposals are queries in training, too, several of which find the
    same object (hybrid matching, `model/family/one_to_many.py`: 1500, +1.7 AP in 12
    epochs). 0: none."""
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
        check(self)
