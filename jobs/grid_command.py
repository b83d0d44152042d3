"""`python -m jobs grid`: options, what would be done, and the grid's end."""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jobs.cluster import local_cluster
from jobs.delivery import deliver
from jobs.demo import DemoOptions, prepare
from jobs.grid import Entry, Grid, entries, runs
from jobs.grid_dry_run import action, dry_run, looked
from jobs.grid_file import find_grid
from jobs.grid_options import DEMO_DATA, GridOptions, called, check, common
from jobs.grid_pruning import Pruning, pruning
from jobs.grid_state import (
    CHANGED,
    DONE,
    PRUNED,
    RESUME,
    Code,
    look,
    nothing_runs,
    read_grid,
    write_json,
)
from jobs.grid_status import rows, text
from jobs.papers_grids import PAPERS_GRIDS
from jobs.spec import JobSpec
from jobs.submit import connect
from pipeline.cli import parse
from pipeline.errors import UserError
from pipeline.whole_file import PARTIAL

LOCK = "lock"  # in a grid's folder
# Seconds that a cluster may not answer: one elsewhere may be restarted, or the network be away.
PATIENCE, LOCAL_PATIENCE = 600.0, 60.0


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
    from pipeline.data.loader import micro_batch_size  # brings torch

    for entry in wanted:
        micro_batch_size(entry.config, options.workers)
    band = pruning(folder, wanted, grid.reference, options.reference, options.band, options.prune)
    if options.dry_run:
        dry_run(called(grid, options), folder, wanted, options, band)
        check(grid, replace(options, dry_run=False))  # which lets a grid be shown without data
        require_data(wanted, options)
        return
    if options.scale == "demo" and not options.data.train:
        prepare(DEMO_DATA.resolve(), DemoOptions())
    if options.plan:
        plan(folder, wanted, options)
        return
    train(grid, folder, wanted, options, band, args)


def require_same_grid(folder: Path, name: str) -> None:
    """Raises `UserError` where the folder holds another grid, or something else."""
    if folder.exists() and (not folder.is_dir() or any(map(_counts, folder.iterdir()))):
        if not (folder / "grid.json").is_file():
            raise UserError(f"--output {folder} holds something else; choose a new or empty folder")
        there = read_grid(folder)["name"]
        if there != name:
            raise UserError(
                f"--output {folder} has the grid {there!r}, expected {name!r} or a new folder"
            )


def _counts(path: Path) -> bool:
    """Whether it is more than a command leaves that has begun, or was killed, before grid.json."""
    return path.name != LOCK and path.suffix != PARTIAL


def plan(folder: Path, wanted: list[Entry], options: GridOptions) -> None:
    """Measures what is not done yet, and prints hours, GPU-hours, cost and the end."""
    from jobs.grid_plan import Planned, measure_in_a_process, report

    planned = []
    for entry in chosen(wanted, options):
        if entry.evaluates:
            continue
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
    """The runs of the cells that `--only` names, or of all."""
    return runs(e for e in wanted if not options.only or e.cell in options.only)


def train(
    grid: Grid,
    folder: Path,
    wanted: list[Entry],
    options: GridOptions,
    band: Pruning,
    args: list[str],
) -> None:
    """Runs what is not done. Raises `UserError` where cells are left over at the end."""
    require_data(wanted, options)  # before Ray is started
    with ExitStack() as stack:
        stack.enter_context(sole(folder))
        require_same_grid(folder, called(grid, options))  # another command may have ended since
        write_grid(folder, called(grid, options), grid.baseline, wanted, args)
        found = looked(folder, wanted, options, band)
        todo = []
        for entry in chosen(wanted, options):
            say(f"{entry.run}: {action(found[entry.run], entry)}")
            if found[entry.run].state not in (DONE, PRUNED):
                todo.append(entry)
        # What the others are held against has to be there in time.
        todo.sort(key=lambda entry: entry.cell != grid.reference)
        if todo:
            if not options.address:  # called once the local Ray has ended, whatever ended it
                stack.callback(nothing_runs, folder, [entry.run for entry in todo])
            address = options.address or stack.enter_context(local_cluster()).jobs
            # Brings Ray, which reads once, at import, the token that a local cluster has set.
            from jobs.grid_run import GridRunner, Submission

            client = connect(address)
            spec = JobSpec(
                config="",
                folder="",
                workers=options.workers,
                cpus_per_worker=options.cpus_per_worker,
                restarts=options.restarts,
                grace=options.grace,
                tracking_uri=options.tracking_uri,
                experiment=called(grid, options),
                register=options.register,
                model_name=options.model_name or called(grid, options),
                grid=str(folder),
            )
            submission = Submission(
                address,
                called(grid, options),
                options.parallel,
                options.retries,
                PATIENCE if options.address else LOCAL_PATIENCE,
                spec,
            )
            anew = {run for run, how in found.items() if how.state == CHANGED}
            try:
                GridRunner(client, folder, submission, say, band).run(todo, anew)
            finally:
                deliver(folder, options.tracking_uri, say)
                print("\n".join(["", *text(rows(folder))]), flush=True)
        else:
            deliver(folder, options.tracking_uri, say)
    left = [row for row in rows(folder) if row.state != DONE]
    left = [row for row in left if not options.only or row.cell in options.only]
    if left:
        pruned = any(row.state == PRUNED for row in left)
        raise UserError(
            f"{len(left)} of {len(wanted)} cells are not done: "
            f"{', '.join(f'{row.cell} ({row.state})' for row in left)}; logs are in "
            f"{folder / 'logs'}; the same command runs what is left"
            f"{', pruned ones without --prune' if pruned and options.prune else ''}"
        )
    print(f"all done; python -m jobs compare {folder} sets it beside what was published")


def require_data(wanted: list[Entry], options: GridOptions) -> None:
    """Raises `UserError` where the grid's data is not there, or not fit to train on, as far as
    this machine sees it: with an address only the cluster's nodes may."""
    if not options.address and options.data.train:
        from pipeline.dataset import open_shards

        for location in (options.data.train, options.data.val):
            open_shards(location, wanted[0].config.data)


def sole(folder: Path) -> Any:
    """Keeps a second command out of the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"grid {folder} is being run by another command; watch it with: "
            f"python -m jobs status --grid {folder}"
        ) from None


def write_grid(
    folder: Path, name: str, baseline: str, wanted: list[Entry], args: list[str]
) -> None:
    """Writes grid.json: the cells, and the command for `jobs resume`."""
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
    command = {"arguments": args, "directory": str(Path.cwd())}  # for jobs resume
    content = {"name": name, "baseline": baseline or None, "cells": cells, "command": command}
    write_json(folder / "grid.json", content)


def say(line: str) -> None:
    """Prints a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
