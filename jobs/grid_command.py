"""`python -m jobs grid`: options, what would be done, and the grid's end."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from jobs.cluster import local_cluster
from jobs.demo import DemoOptions, prepare
from jobs.grid import Entry, Grid, changed, entries, runs
from jobs.grid_file import find_grid
from jobs.grid_state import (
    CHANGED,
    DONE,
    RESUME,
    Code,
    Found,
    look,
    read_grid,
    set_aside,
    write_json,
)
from jobs.grid_status import columns, rows, text
from jobs.papers_grids import PAPERS_GRIDS
from jobs.spec import JobSpec
from pipeline.cli import parse
from pipeline.config import DataConfig, RunConfig
from pipeline.data.loader import micro_batch_size
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
    tracking_uri: str = ""
    """As of jobs submit."""


def run_grid(args: list[str]) -> None:
    prog = "python -m jobs grid"
    description = (
        "Trains a grid of experiments, the paper's or your own, and goes on with what is there."
        f"\n\nExample: {prog} table2 --address http://head:8265 --output /shared/grids/table2 "
        "--data.train /shared/train --data.val /shared/val --backbones /shared/backbones"
        f"\n         {prog} table2 --scale demo"
    )
    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            parse(GridOptions, args, f"{prog} NAME|FILE", description)
        raise UserError(
            f"{prog}: expected a grid first, {', '.join(PAPERS_GRIDS)}, or a .yaml or .py file"
        )
    grid = find_grid(args[0])
    options = parse(GridOptions, args[1:], f"{prog} {args[0]}", description)
    check(grid, options)
    folder = (options.output or Path("outputs/grids") / called(grid, options)).resolve()
    require_same_grid(folder, called(grid, options))
    wanted = entries(grid, options.scale == "demo", options.seeds, common(options))
    for entry in wanted:
        micro_batch_size(entry.config, options.workers)
    if options.dry_run:
        tell(called(grid, options), folder, wanted, options)
        return
    if options.scale == "demo" and not options.data.train:
        prepare(DEMO_DATA.resolve(), DemoOptions())
    if options.plan:
        plan(folder, wanted, options)
        return
    train(grid, folder, wanted, options)


def called(grid: Grid, options: GridOptions) -> str:
    return grid.name + (DEMO_SCALE if options.scale == "demo" else "")


def check(grid: Grid, options: GridOptions) -> None:
    """Raises `UserError` for what can be seen to be wrong without a cluster."""
    from jobs.tracking import shown

    for name, least in (
        ("seeds", 1), ("workers", 1), ("cpus_per_worker", 1), ("parallel", 0), ("retries", 0),
        ("restarts", 0), ("plan_steps", 1), ("price", 0), ("grace", 1),
    ):  # fmt: skip
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"{option}: got {getattr(options, name)}, expected {least} or more")
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
    if shown(options.tracking_uri) != options.tracking_uri:
        raise UserError(
            f"tracking-uri {shown(options.tracking_uri)}: got a user or password in it, which Ray "
            f"would show to all who see the job; docs/cluster.md says where it goes"
        )


def common(options: GridOptions) -> Any:
    """What every cell's config gets: data, weights of its backbone, and --set."""
    data = options.data
    if options.scale == "demo" and not data.train:
        size = DemoOptions()
        shards = DEMO_DATA.resolve() / f"shards-{size.train_images}-{size.val_images}"
        data = replace(data, train=str(shards / "train"), val=str(shards / "val"))

    def of(config: RunConfig) -> RunConfig:
        own = config.data
        given = replace(
            own, train=own.train or data.train, val=own.val or data.val,
            cache_dir=own.cache_dir or data.cache_dir, cache_gb=data.cache_gb,
        )  # fmt: skip
        config = replace(config, data=given)
        if options.backbones and options.scale == "full" and not config.init.weights:
            file = options.backbones / f"{config.model.backbone.removesuffix('_dcn')}.pth"
            if not options.address and not file.is_file():
                raise UserError(f"backbones: {file} does not exist, expected torchvision's weights")
            config = replace(config, init=replace(config.init, backbone=str(file.resolve())))
        return changed(config, dict(options.set))

    return of


def require_same_grid(folder: Path, name: str) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        there = read_grid(folder)["name"]
        if there != name:
            raise UserError(
                f"--output {folder} has the grid {there!r}, expected {name!r} or a new folder"
            )


def digests(found: list[Entry]) -> dict[str, dict[str, str]]:
    """By run, the digests of its data, where this machine sees it: elsewhere the job will tell."""
    from pipeline.dataset import open_dataset

    opened: dict[tuple[DataConfig, str], dict[str, str]] = {}
    by_run = {}
    for entry in found:
        key = (entry.config.data, entry.config.model.architecture)
        if key not in opened:
            try:
                dataset = open_dataset(entry.config)
                opened[key] = {"train": dataset.train.digest, "val": dataset.val.digest}
            except (UserError, OSError):
                opened[key] = {}
        by_run[entry.run] = opened[key]
    return by_run


def looked(folder: Path, wanted: list[Entry], options: GridOptions) -> dict[str, Found]:
    """How each run stands, by its name."""
    code, data = Code.present(), digests(runs(wanted))
    return {
        entry.run: look(folder, entry, data[entry.run], code, options.rerun_changed_code)
        for entry in runs(wanted)
    }


def tell(name: str, folder: Path, wanted: list[Entry], options: GridOptions) -> None:
    found = looked(folder, wanted, options)
    cells = [("cell", "seed", "would", "difference from the baseline")]
    for entry in wanted:
        differs = [f"{k} {short(a)} -> {short(b)}" for k, (a, b) in entry.differences.items()]
        own = entry.folder == f"runs/{entry.cell}-seed{entry.seed}"
        would = action(found[entry.run]) if own else f"share the run {entry.run}"
        if options.only and entry.cell not in options.only:
            would = "be left as it is (--only)"
        cells.append((entry.cell, str(entry.seed), would, ", ".join(differs) or "-"))
    print(f"{name}: {len(wanted)} cells, {len(found)} runs in {folder}")
    print("\n".join(columns(cells)))


def short(value: Any) -> str:
    """A value in a table; of a path its end."""
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 40 else f"…{text[-36:]}"


def action(found: Found) -> str:
    why = f" ({found.why})" if found.why else ""
    now = found.progress
    return {
        DONE: f"do nothing: done{why}",
        RESUME: f"go on after epoch {now.epoch:.1f} of {now.epochs}{why}",
        CHANGED: f"train anew, and move the old run to replaced/{why}",
    }.get(found.state, f"train{', as it failed' if why else ''}{why}")


def plan(folder: Path, wanted: list[Entry], options: GridOptions) -> None:
    from jobs.grid_plan import Planned, measure_in_a_process, report

    planned = []
    for entry in chosen(wanted, options):
        found = look(folder, entry, {}, Code.present(), options.rerun_changed_code)
        now = found.progress
        if found.state != DONE:
            share = 1 - now.epoch / now.epochs if found.state == RESUME and now.epochs else 1.0
            print(f"measuring {entry.run}", file=sys.stderr, flush=True)
            measured = measure_in_a_process(entry.config, options.workers, options.plan_steps)
            planned.append(Planned(entry, share, measured))
    if not planned:
        print("every run is done")
        return
    print("\n".join(report(planned, options.workers, max(1, options.parallel), options.price)))


def chosen(wanted: list[Entry], options: GridOptions) -> list[Entry]:
    return runs(e for e in wanted if not options.only or e.cell in options.only)


def train(grid: Grid, folder: Path, wanted: list[Entry], options: GridOptions) -> None:
    from jobs.grid_run import GridRunner, Submission
    from jobs.submit import connect

    if not options.address and options.data.train:
        from pipeline.dataset import open_shards

        for location in (options.data.train, options.data.val):
            open_shards(location, wanted[0].config.data)  # look before Ray is started
    with ExitStack() as stack:
        stack.enter_context(sole(folder))
        write_grid(folder, called(grid, options), grid.baseline, wanted)
        found = looked(folder, wanted, options)
        todo = []
        for entry in chosen(wanted, options):
            say(f"{entry.run}: {found[entry.run].state}, would {action(found[entry.run])}")
            if found[entry.run].state != DONE:
                todo.append(entry)
        if todo:
            address = options.address or stack.enter_context(local_cluster())
            client = connect(address)
            for entry in todo:
                if found[entry.run].state == CHANGED:
                    say(f"{entry.run}: the old run is now {set_aside(folder, entry)}")
            spec = JobSpec(
                config="",
                folder="",
                workers=options.workers,
                cpus_per_worker=options.cpus_per_worker,
                restarts=options.restarts,
                grace=options.grace,
                tracking_uri=options.tracking_uri,
                experiment=called(grid, options),
            )
            submission = Submission(
                address, called(grid, options), options.parallel, options.retries, spec
            )
            try:
                GridRunner(client, folder, submission, say).run(todo)
            finally:
                print("\n".join(["", *text(rows(folder))]), flush=True)
    left = [row for row in rows(folder) if row.state != DONE]
    left = [row for row in left if not options.only or row.cell in options.only]
    if left:
        raise UserError(
            f"{len(left)} of {len(wanted)} cells are not done: "
            f"{', '.join(f'{row.cell} ({row.state})' for row in left)}; logs are in "
            f"{folder / 'logs'}; the same command runs what is left"
        )
    print(f"all done; python -m jobs compare {folder} sets it beside what was published")


def sole(folder: Path) -> Any:
    """Keeps a second command out of the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"grid {folder} is being run by another command; watch it with: "
            f"python -m jobs status --grid {folder}"
        ) from None


def write_grid(folder: Path, name: str, baseline: str, wanted: list[Entry]) -> None:
    cells = [
        {
            "name": entry.cell,
            "folder": entry.folder,
            "seed": entry.seed,
            "published": entry.published or None,
            "differences": entry.differences,
        }
        for entry in wanted
    ]
    write_json(folder / "grid.json", {"name": name, "baseline": baseline or None, "cells": cells})


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
