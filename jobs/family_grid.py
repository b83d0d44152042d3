"""The grid of the DETR family: its methods beside Deformable DETR, and its recipe of 12 epochs."""

from jobs.grid import Cell, Grid
from pipeline.family_recipes import FAMILY


def family() -> Grid:
    """Each recipe of the family as its authors train it. At demo scale `--set schedule.epochs N`
    makes all see the same images, which their epochs would not: 6 for 50 and 1 for 12."""
    of_the_paper = (
        Cell("deformable_detr", "deformable_detr_r50", {}, "table1/deformable_detr"),
        Cell("two_stage", "deformable_detr_r50_two_stage", {}, "table1/deformable_detr_two_stage"),
        Cell("deformable_detr_12ep", "deformable_detr_r50_12ep"),
        Cell("detr_dc5", "detr_r50_dc5", {}, "table1/detr_dc5"),
    )
    names = [function.__name__ for function in FAMILY]
    others = [Cell(name, name, {}, f"family/{name}") for name in names]
    return Grid("family", (*of_the_paper, *others), baseline="deformable_detr")
