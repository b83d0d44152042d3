"""How each run of a grid stands, and what its command would do about it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.grid import PAPERS_EPOCHS, Entry, runs
from jobs.grid_options import GridOptions
from jobs.grid_pruning import Pruning
from jobs.grid_state import CHANGED, DONE, PRUNED, RESUME, Code, Found, look
from jobs.grid_status import columns
from model.config import TINY
from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.recipes import demo


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


def looked(
    folder: Path, wanted: list[Entry], options: GridOptions, pruning: Pruning
) -> dict[str, Found]:
    """How each run stands, by its name."""
    code, data = Code.present(), digests(runs(wanted))
    found = {}
    for entry in runs(wanted):
        one = look(folder, entry, data[entry.run], code, options.rerun_changed_code)
        if one.state == RESUME and one.record.outcome == PRUNED:
            flag = pruning.flag(entry)
            if pruning.stop and flag:
                one = replace(one, state=PRUNED, why=flag)
            else:
                one = replace(one, why="; ".join(filter(None, (pruned_before(flag), one.why))))
        found[entry.run] = one
    return found


def pruned_before(flag: str) -> str:
    """Why a pruned run is left, or taken up."""
    return f"pruned before: {flag}" if flag else "pruned before, and within the band now"


def dry_run(
    name: str, folder: Path, wanted: list[Entry], options: GridOptions, pruning: Pruning
) -> None:
    """Prints what would be done with each cell, for how many epochs, and how it differs from the
    baseline."""
    found = looked(folder, wanted, options, pruning)
    cells = [("cell", "seed", "epochs", "would", "difference from the baseline")]
    for entry in wanted:
        differs = [f"{k} {short(a)} -> {short(b)}" for k, (a, b) in entry.differences.items()]
        own = entry.folder == f"runs/{entry.cell}-seed{entry.seed}"
        would = action(found[entry.run], entry) if own else f"share the run {entry.run}"
        if options.only and entry.cell not in options.only:
            would = "be left as it is (--only)"
        epochs = "-" if entry.evaluates else str(entry.config.schedule.epochs)
        cells.append((entry.cell, str(entry.seed), epochs, would, ", ".join(differs) or "-"))
    print(f"{name}: {len(wanted)} cells, {len(found)} runs in {folder}")
    print("\n".join([*columns(cells), *remarks(found, wanted, options)]))


def remarks(found: dict[str, Found], wanted: list[Entry], options: GridOptions) -> list[str]:
    """What the table does not say of itself."""
    said = []
    if options.scale == "demo" and "schedule.epochs" not in dict(options.set):
        said.append(
            f"at demo scale {demo().schedule.epochs} epochs stand for {PAPERS_EPOCHS}, others in "
            f"proportion; --set schedule.epochs N is taken as it is"
        )
    random = [
        entry
        for entry in runs(wanted)
        if found[entry.run].state != DONE
        and not (entry.evaluates or entry.config.init.backbone or entry.config.init.weights)
        and entry.config.model.backbone not in TINY
    ]
    if random:
        said.append(
            f"{len(random)} runs start from random weights; --backbones DIR gives them ImageNet's, "
            f"which the published AP needs"
        )
    return said


def short(value: Any) -> str:
    """A value in a table; of a path its end."""
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) < 40 else f"…{text[-36:]}"


def action(found: Found, entry: Entry) -> str:
    """What would be done with a run in this state, in words."""
    why = f" ({found.why})" if found.why else ""
    now = found.progress
    if entry.evaluates and found.state != DONE:
        of = entry.evaluates.rpartition("/")[2]
        return f"evaluate {of} with test-time augmentation{why}"
    return {
        DONE: f"do nothing: done{why}",
        PRUNED: f"do nothing: pruned{why}",
        RESUME: f"go on after epoch {now.epoch:.1f} of {now.epochs}{why}",
        CHANGED: f"train anew, and move the old run to replaced/{why}",
    }.get(found.state, f"train{', as it failed' if why else ''}{why}")
