"""Options of `python -m jobs grid`, and what they make of every cell's config."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from jobs.demo import DemoOptions
from jobs.grid import Grid, changed
from jobs.grid_pruning import Band
from jobs.spec import absolute
from jobs.tracking import check_model_name, check_tracking_uri
from model.config import TINY
from model.config_checks import check_numbers
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.recipes import DEMO_SCALE

DEMO_DATA = Path("outputs/demo")  # where `make demo` has its data


@dataclass(frozen=True)
class GridData:
    """Of every cell, but for what a cell changes itself; other fields of data by --set."""

    train: str = ""
    """Shard folder to train on, or its URL. At demo scale pictures are drawn, unless given."""
    val: str = ""
    """Shard folder to evaluate on, or its URL."""
    cache_dir: str = ""
    """As of jobs submit."""
    cache_gb: float = 100.0
    """As of jobs submit."""


@dataclass(frozen=True)
class GridOptions:
    output: Path | None = None
    """The grid's folder, on storage that every node sees. One that exists is gone on with. Empty:
    outputs/grids/NAME, with _demo behind it at demo scale."""
    data: GridData = field(default_factory=GridData)
    backbones: Path | None = None
    """Folder of ImageNet weights in torchvision's format, named by backbone: resnet50.pth, …"""
    scale: Literal["full", "demo"] = "full"
    """demo: every cell with a small network on drawn pictures."""
    seeds: int = 1
    """Runs of every cell, with the seeds that follow the cell's own."""
    only: tuple[str, ...] = ()
    """Cells to run; the others stay as they are."""
    set: tuple[tuple[str, str], ...] = ()
    """Fields of all cells with their values: --set schedule.epochs 12 engine.precision fp32"""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    plan: bool = False
    """Measure a few steps of every run on this machine, say what the grid would take, and train
    nothing."""
    plan_steps: int = 20
    price: float = 0.0
    """Of an hour of one worker, for --plan."""
    address: str = ""
    """Ray Jobs address, such as http://HOST:8265. Empty: a local Ray for as long as the grid
    runs."""
    workers: int = 1
    """Training processes of each run; each takes a GPU where the cluster has them."""
    cpus_per_worker: int = 1
    parallel: int = 0
    """Most runs at once. 0: as many as the cluster's nodes have room for."""
    retries: int = 1
    """How often a run that failed is submitted again, beside the restarts of its job."""
    restarts: int = 3
    """As of jobs submit."""
    grace: float = 120.0
    """As of jobs submit."""
    rerun_changed_code: bool = False
    """Train runs anew that other code has trained."""
    prune: bool = False
    """Stop runs that leave the band of the reference, which otherwise are flagged alone. A slow
    starter leaves it, too."""
    reference: tuple[Path, ...] = ()
    """Run folders that all cells are held against, seeds of one experiment. None: the baseline's
    own runs in this grid."""
    band: Band = field(default_factory=Band)
    tracking_uri: str = ""
    """As of jobs submit."""
    register: bool = True
    """Register each run's best checkpoint in MLflow's model registry."""
    model_name: str = ""
    """Its name there, of all cells. Empty: the grid's."""

    def __post_init__(self) -> None:
        check_numbers(self)


def called(grid: Grid, options: GridOptions) -> str:
    """The grid's name, with its suffix at demo scale."""
    return grid.name + (DEMO_SCALE if options.scale == "demo" else "")


def check(grid: Grid, options: GridOptions) -> None:
    """Raises `UserError` for what can be seen to be wrong without a cluster."""
    for name, least in (
        ("seeds", 1), ("workers", 1), ("cpus_per_worker", 1), ("parallel", 0), ("retries", 0),
        ("restarts", 0), ("plan_steps", 1), ("price", 0), ("grace", 1),
    ):  # fmt: skip
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"{option}: got {getattr(options, name)}, expected {least} or more")
    if options.grace > 1e6:
        raise UserError(f"grace: got {options.grace:g}, expected seconds, at most 1e6")
    names = [cell.name for cell in grid.cells]
    for name in options.only:
        if name not in names:
            raise UserError(f"only: got {name!r}, expected cells of it: {', '.join(names)}")
    if options.dry_run and options.plan:
        raise UserError("dry-run, plan: got both, expected one of them")
    if bool(options.data.train) != bool(options.data.val):
        raise UserError("data: got one of --data.train and --data.val, expected both")
    if options.scale == "full" and not options.data.train:
        own = all({"data.train", "data.val"} <= set(cell.changes) for cell in grid.cells)
        if not (own or options.dry_run):
            raise UserError("data: expected --data.train DIR --data.val DIR, or --scale demo")
    check_tracking_uri(options.tracking_uri)
    check_model_name(options.model_name)


def common(options: GridOptions) -> Callable[[RunConfig], RunConfig]:
    """What every cell's config gets: data, weights of its backbone, and --set."""
    data = options.data
    if options.scale == "demo" and not data.train:
        size = DemoOptions()
        shards = DEMO_DATA.resolve() / f"shards-{size.train_images}-{size.val_images}"
        data = replace(data, train=str(shards / "train"), val=str(shards / "val"))

    def of(config: RunConfig) -> RunConfig:
        own = config.data
        given = replace(
            own,
            train=absolute(own.train or data.train),
            val=absolute(own.val or data.val),
            cache_dir=own.cache_dir or data.cache_dir,
            cache_gb=data.cache_gb,
        )
        config = replace(config, data=given)
        needs_none = config.model.backbone in TINY or config.init.weights
        if options.backbones and not needs_none:
            file = options.backbones / f"{config.model.backbone.removesuffix('_dcn')}.pth"
            if not options.address and not file.is_file():
                raise UserError(f"backbones: {file} does not exist, expected torchvision's weights")
            config = replace(config, init=replace(config.init, backbone=str(file.resolve())))
        return changed(config, dict(options.set))

    return of
