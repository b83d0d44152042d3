"""The 12-epoch recipe taken apart: a grid that switches its parts on one after the other."""

from dataclasses import replace
from typing import Any

from jobs.grid import Cell, Grid, changed
from pipeline.recipes import deformable_detr_r50_12ep, deformable_detr_r50_two_stage


def recipe12() -> Grid:
    """From two-stage Deformable DETR to `deformable_detr_r50_12ep`, all of 12 epochs with the same
    schedule, batch and width. Each cell has what the one before has, and what its name says; the
    last has all but one-to-many supervision, which may not add to denoising."""
    whole = deformable_detr_r50_12ep()
    plain = deformable_detr_r50_two_stage()
    config = replace(
        plain,
        model=replace(plain.model, feedforward_dim=whole.model.feedforward_dim),
        optimizer=replace(plain.optimizer, batch_size=whole.optimizer.batch_size),
        schedule=whole.schedule,
    )
    one_to_many = {"model.one_to_many_queries": whole.model.one_to_many_queries}
    steps: list[tuple[str, dict[str, Any], str]] = [
        ("no_dropout", {"model.dropout": whole.model.dropout}, ""),
        ("mixed_selection", {"model.mixed_query_selection": True}, ""),
        ("look_forward_twice", {"model.look_forward_twice": True}, "recipe12/tricks"),
        ("one_to_many", one_to_many, "recipe12/one_to_many"),
        ("denoising", {"model.denoising_pairs": whole.model.denoising_pairs}, ""),
        ("average", {"optimizer.ema_decay": whole.optimizer.ema_decay}, ""),
        ("all_but_one_to_many", {"model.one_to_many_queries": 0}, ""),
    ]
    cells = [Cell("two_stage", config, {}, "recipe12/two_stage")]
    for name, changes, published in steps:
        config = changed(config, changes)
        cells.append(Cell(name, config, {}, published))
    return Grid("recipe12", tuple(cells), baseline="two_stage")
