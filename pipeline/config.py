"""What a run is: frozen, typed, checked dataclasses with a stable digest.

Every field can be overridden on the command line, for example
``--optimizer.lr 1e-4 --schedule.epochs 12``.
"""

import dataclasses
import hashlib
import json
import reprlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from model.config import ModelConfig
from model.config_checks import check_numbers


def _require(condition: bool, what: str, got: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{what}: got {got!r}, expected {expected}")


# Fields of `data` that say where it lies, not what it is.
LOCATIONS = ("train", "val", "cache_dir", "cache_gb")


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are, and how categories become class columns."""

    train: str = ""
    """Shard folder to train on (made by `python -m data_prep convert`), or its URL: s3://, gs://, …
    with the driver of fsspec for it."""
    val: str = ""
    """Shard folder to evaluate on, or its URL."""
    cache_dir: str = ""
    """For URLs: folder of this node for shards that are needed. Empty: one in ~/.cache."""
    cache_gb: float = 100.0
    """Most gigabytes (10**9 bytes) of it; the shards used longest ago make room."""
    labels: Literal["contiguous", "contiguous_from_1", "category_id"] = "contiguous"
    """contiguous: the i-th category in order of id is column i. contiguous_from_1: the same after
    an empty column 0, a Faster R-CNN's background. category_id: the column is the
    category id itself, as in the published COCO checkpoints (91 columns for 80 categories)."""
    shuffle_window: int = 8
    """Shards whose samples are mixed with each other; more mixes better, fewer reads closer."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        _require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "1 or more")
        _require(0 < self.cache_gb <= 1e9, "data.cache_gb", self.cache_gb, "above 0, at most 1e9")


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentation of DETR (its section 4), which Deformable DETR follows."""

    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Training: the shorter side is resized to one of these. Empty: the size is kept."""
    max_side: int = 1333
    """The longer side never exceeds this."""
    crop_probability: float = 0.5
    """Chance to resize to one of crop_short_sides and crop before the final resize."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    """Smallest and largest side of the crop."""
    flip_probability: float = 0.5
    transpose_probability: float = 0.0
    """Chance to swap x and y. Only for data without an up direction."""
    val_short_side: int = 800
    """Evaluation: size of the shorter side. 0: the size is kept."""

    def __post_init__(self) -> None:
        check_numbers(self, "augment.")
        for name in ("crop_probability", "flip_probability", "transpose_probability"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name}", value, "a probability in [0, 1]")
        sides = (*self.short_sides, *self.crop_short_sides, *self.crop_sides, self.max_side)
        _require(all(s >= 1 for s in sides), "augment: sides in pixels", sides, "all 1 or more")
        _require(self.val_short_side >= 0, "augment.val_short_side", self.val_short_side, ">= 0")
        _require(
            self.crop_sides[0] <= self.crop_sides[1],
            "augment.crop_sides",
            self.crop_sides,
            "(smallest, largest)",
        )
        _require(
            self.crop_probability == 0 or bool(self.crop_short_sides),
            "augment.crop_short_sides",
            self.crop_short_sides,
            "at least one size where crop_probability is above 0",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in section 5 of the paper."""

    lr: float = 2e-4
    backbone_lr: float = 2e-5
    offsets_lr_factor: float = 0.1
    """Factor on lr for the projections that predict sampling offsets and reference points."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Largest norm of the whole gradient. 0: no clipping."""
    batch_size: int = 32
    """Images in one optimizer step, over all processes."""
    ema_decay: float = 0.0
    """Of an exponential moving average of the weights, which is then what is evaluated and loaded
    from checkpoints; 0.9997 is common for runs of 100,000 steps. 0: none."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")
        _require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "in [0, 1)")
        for name in ("lr", "backbone_lr", "offsets_lr_factor", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name}", value, "0 or more")
        _require(self.batch_size >= 1, "optimizer.batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run, as a factor on every group's rate."""

    epochs: int = 50
    kind: Literal["step", "cosine"] = "step"
    drop_epochs: tuple[int, ...] = (40,)
    """step: the factor falls by ten at the start of these epochs (counted from 0)."""
    warmup_fraction: float = 0.0
    """Share of all steps in which the factor rises linearly from 0 to 1."""
    final_factor: float = 0.01
    """cosine: the factor at the last step."""
    evaluate_every: int = 1
    """Epochs from one evaluation to the next; after the last epoch there is one in any case. The
    best checkpoint is the best of those that were evaluated."""

    def evaluates(self, epoch: int) -> bool:
        """Whether there is an evaluation after `epoch` epochs."""
        return epoch == self.epochs or epoch % self.evaluate_every == 0

    def __post_init__(self) -> None:
        check_numbers(self, "schedule.")
        for name in ("epochs", "evaluate_every"):
            value = getattr(self, name)
            _require(value >= 1, f"schedule.{name}", value, "1 or more")
        warmup = self.warmup_fraction
        _require(0 <= warmup < 1, "schedule.warmup_fraction", warmup, "a share in [0, 1)")
        _require(0 <= self.final_factor <= 1, "schedule.final_factor", self.final_factor, "[0, 1]")


@dataclass(frozen=True)
class EngineConfig:
    """How the run is executed. Nothing here belongs to the run's identity but the precision."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Autocast precision of the model; losses, matching and box arithmetic stay in fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned over processes: 1 optimizer state, 2 gradients too, 3 parameters too."""
    micro_batch: int = 0
    """Images in one forward pass of one process; the rest of its share is accumulated.
    0: all of them at once."""
    evaluation_batch: int = 8
    """Images in one forward pass of evaluation. Padding depends on it, and AP a little on padding,
    where images have different sizes."""
    loader_workers: int = 4
    """Processes that decode and augment, for each training process. 0: in the process itself."""
    group_by_shape: bool = False
    """Images of like shape share a micro-batch, so that less is padded. The images of a global
    batch stay the same."""
    max_padded_pixels: int = 0
    """Most images x height x width of a micro-batch, padding included; a bound on its memory in
    training (evaluation_batch bounds evaluation's). Where it is passed, the global batch is cut
    into more and smaller ones. 0: no bound."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Most minutes between two checkpoints inside an epoch; one is written at the end of each
    epoch in any case. 0: not by the clock."""
    checkpoint_steps: int = 0
    """Steps between two checkpoints inside an epoch. 0: not by steps."""
    keep_checkpoints: int = 2
    """Latest checkpoints kept, beside the best one."""
    keep_every_epochs: int = 0
    """Period of epochs whose last checkpoint is kept for good. 0: of none."""
    most_skipped_steps: int = 3
    """Steps in a row with a loss or gradient that is not finite, at which the run stops; up to
    then such steps are left out. 1: at once. In fp16 a step at which a smaller loss scale can
    still be tried does not count."""
    check_after: int = 300
    """Steps after which detections are compared with the labels of some training images, once, and
    it is said what looks wrong; with init.weights before the first step, too. 0: never."""
    collective_timeout: float = 600.0
    """Seconds that a process waits for the others before it gives up."""
    deterministic: bool = False
    """Deterministic algorithms only (on a GPU this costs speed)."""

    def __post_init__(self) -> None:
        check_numbers(self, "engine.")
        for name in (
            "micro_batch", "loader_workers", "max_padded_pixels",
            "checkpoint_steps", "checkpoint_minutes", "keep_every_epochs", "check_after",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(value >= 0, f"engine.{name}", value, "0 or more")
        for name in ("log_every", "keep_checkpoints", "evaluation_batch", "most_skipped_steps"):
            value = getattr(self, name)
            _require(value >= 1, f"engine.{name}", value, "1 or more")
        value = self.collective_timeout
        _require(1 <= value <= 1e6, "engine.collective_timeout", value, "1 to 1e6 seconds")


@dataclass(frozen=True)
class InitConfig:
    """Weights to start from, as local files."""

    backbone: str = ""
    """ImageNet weights of the backbone in torchvision's key names."""
    weights: str = ""
    """A checkpoint that the method's authors have published (torchvision's for Faster R-CNN), or
    one of ours (a run folder, a checkpoint in it, a model.pt), of the same architecture; the
    classes may differ."""


@dataclass(frozen=True)
class RunConfig:
    """One experiment. `python -m pipeline recipes` lists the named ones."""

    recipe: Annotated[str, tyro.conf.Suppress]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: int = 42

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2**32)")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "RunConfig":
        """The config that `to_json` wrote. A field that an older version did not have yet takes its
        default; an unknown one, or a value of another type, raises ValueError."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"config: not JSON ({error})") from None
        config: RunConfig = _from_dict(RunConfig, content, "config")
        return config

    def identity(self) -> dict[str, Any]:
        """What decides the result: neither where the data lies (it has a digest of its own) nor
        how the work is spread over processes."""
        identity = dataclasses.asdict(self)
        for location in LOCATIONS:
            del identity["data"][location]
        identity["engine"] = {"precision": self.engine.precision}
        return identity

    def digest(self) -> str:
        """SHA-256 of the identity."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _from_dict(cls: type, values: Any, where: str) -> Any:
    """A dataclass from nested dictionaries, as JSON gives them (lists stand for tuples)."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {_short(values)}, expected an object with its fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{where}: got {', '.join(unknown)[:100]}, expected fields of this version only; "
            f"it was written by a newer one"
        )
    absent = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ValueError(f"{where}: got no {', '.join(absent)}, expected it")
    kinds = get_type_hints(cls)
    arguments = {
        name: _from_dict(kinds[name], value, f"{where}.{name}")
        if dataclasses.is_dataclass(kinds[name])
        else _of_kind(kinds[name], value, f"{where}.{name}")
        for name, value in values.items()
    }
    return cls(**arguments)


def _of_kind(kind: Any, value: Any, where: str) -> Any:
    """The value of a field of that type; lists become tuples. Raises ValueError for another."""
    if get_origin(kind) is Literal:
        # By type, too: True equals 1.
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            choices = ", ".join(map(str, get_args(kind)))
            raise ValueError(f"{where}: got {_short(value)}, expected one of {choices}")
        return value
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        many = inner[-1] is ...
        if not isinstance(value, list | tuple) or not (many or len(value) == len(inner)):
            expected = "a list" if many else f"a list of {len(inner)}"
            raise ValueError(f"{where}: got {_short(value)}, expected {expected}")
        return tuple(
            _of_kind(inner[0] if many else inner[i], item, f"{where}[{i}]")
            for i, item in enumerate(value)
        )
    if kind is float and type(value) is int and abs(value) < 2**63:
        return value
    if type(value) is not kind or (kind is int and abs(value) >= 2**63):
        raise ValueError(f"{where}: got {_short(value)}, expected {NAMES_OF_KINDS[kind]}")
    return value


NAMES_OF_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text",
}  # fmt: skip


def _short(value: Any) -> str:
    """A value in a message: a part of it where it is long or deep."""
    return reprlib.repr(value)
