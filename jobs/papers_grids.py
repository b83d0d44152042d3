"""The grids of the paper: every row of its tables that is trained, and Figure 3's curves. And all
grids by name, ours too.

Each row is a recipe with the few changes that the table names. `published` keys are those of
`jobs/published.json`. Rows of other detectors in Table 3 have published numbers only.
"""

from collections.abc import Callable
from typing import Any

from jobs.family_grid import family
from jobs.grid import Cell, Grid, changed, name_of
from jobs.recipe12_grid import recipe12
from pipeline.recipes import deformable_detr_r50

# DETR's short schedule, which the paper gives Deformable DETR, too.
EPOCHS_50 = {"schedule.epochs": 50, "schedule.drop_epochs": (40,)}


def table1() -> Grid:
    """Against DETR and Faster R-CNN on val2017 (section 5.1)."""
    return Grid(
        "table1",
        (
            Cell("faster_rcnn", "faster_rcnn_r50_fpn", {}, "table1/faster_rcnn_fpn"),
            Cell("detr", "detr_r50", {}, "table1/detr"),
            Cell("detr_dc5", "detr_r50_dc5", {}, "table1/detr_dc5"),
            Cell("detr_dc5_50_epochs", "detr_r50_dc5", EPOCHS_50, "table1/detr_dc5_50"),
            Cell("detr_dc5_plus", "detr_r50_dc5_plus", {}, "table1/detr_dc5_plus"),
            Cell("deformable_detr", "deformable_detr_r50", {}, "table1/deformable_detr"),
            Cell("refine", "deformable_detr_r50_refine", {}, "table1/deformable_detr_refine"),
            Cell(
                "two_stage", "deformable_detr_r50_two_stage", {}, "table1/deformable_detr_two_stage"
            ),
        ),
        baseline="deformable_detr",
    )


def table2() -> Grid:
    """Ablations of deformable attention (section 5.2). "MS attention" is `model.level_exchange`,
    and K is `model.num_points`, which the baseline has as 4."""
    rows: dict[str, dict[str, Any]] = {
        "table2/fpn": {"model.neck": "fpn"},
        "table2/bifpn": {"model.neck": "bifpn"},
        "table2/single_scale_k1": {"model.num_levels": 1, "model.num_points": 1},
        "table2/ms_inputs_k1": {"model.level_exchange": False, "model.num_points": 1},
        "table2/ms_inputs_k4": {"model.level_exchange": False},
        "table2/ms_attention_k4": {},
    }
    baseline = deformable_detr_r50()
    cells = [
        Cell(
            name_of(baseline, changed(baseline, changes), changes),
            "deformable_detr_r50",
            changes,
            published,
        )
        for published, changes in rows.items()
    ]
    return Grid("table2", tuple(cells), baseline="baseline")


def table3() -> Grid:
    """Backbones, all two-stage, and the best one's run with test-time augmentation. The paper's
    numbers are of test-dev, whose annotations are not public: what is measured here is val2017."""
    rows = {
        "resnet50": ("deformable_detr_r50_two_stage", "table3/r50"),
        "resnet101": ("deformable_detr_r101_two_stage", "table3/r101"),
        "resnext101": ("deformable_detr_x101_two_stage", "table3/x101"),
        "resnext101_dcn": ("deformable_detr_x101_dcn_two_stage", "table3/x101_dcn"),
    }
    cells = [Cell(name, base, {}, published) for name, (base, published) in rows.items()]
    best = "deformable_detr_x101_dcn_two_stage"
    cells.append(Cell("resnext101_dcn_tta", best, {}, "table3/x101_dcn_tta", tta=True))
    return Grid("table3", tuple(cells), baseline="resnet50")


def figure3() -> Grid:
    """Convergence of Deformable DETR and DETR-DC5. The paper drops Deformable DETR's rate at
    several epochs without saying which: here after 20 and 30, beside its usual 40."""
    return Grid(
        "figure3",
        (
            Cell("deformable_detr", "deformable_detr_r50", {}, "table1/deformable_detr"),
            *(
                Cell(
                    f"deformable_detr_drop_{drop}",
                    "deformable_detr_r50",
                    {"schedule.epochs": drop + 10, "schedule.drop_epochs": (drop,)},
                )
                for drop in (30, 20)
            ),
            Cell("detr_dc5_plus", "detr_r50_dc5_plus", {}, "table1/detr_dc5_plus"),
            Cell("detr_dc5_50_epochs", "detr_r50_dc5", EPOCHS_50, "table1/detr_dc5_50"),
            Cell("detr_dc5", "detr_r50_dc5", {}, "table1/detr_dc5"),
        ),
        baseline="deformable_detr",
    )


PAPERS_GRIDS: dict[str, Callable[[], Grid]] = {
    function.__name__: function for function in (table1, table2, table3, figure3, recipe12, family)
}
