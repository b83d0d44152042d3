"""Run folders and grids as the pipeline and `jobs grid` write them, with made-up numbers."""

import json
from pathlib import Path

import numpy as np

from jobs.compare import compare
from jobs.measured import read_grid

CLASSES = ("person", "bicycle", "car")
COCO = tuple(f"class {i}" for i in range(80))
HOUR = 3600.0
FULL = "table2/ms_attention_k4"
HOSTILE = '</script><img src=x onerror=alert(1)> & "q" | `c` *'


def write_run(
    folder,
    curve,
    *,
    epochs=None,
    seed=42,
    classes=CLASSES,
    step_hours=0.25,
    world=2,
    steps_per_epoch=10,
    val="",
    val_digest="val",
    parts=None,
    lift=None,
    **config,
):
    """`curve`: AP (a fraction) of each evaluation, one an epoch. `parts`: fraction of AP for the
    other metrics; `lift`: class -> AP over the mean."""
    folder = Path(folder)
    (folder / "evaluations").mkdir(parents=True)
    schedule = {
        "epochs": epochs or len(curve),
        "kind": "step",
        "drop_epochs": [len(curve) * 4 // 5],
    }
    identity = {
        "config": {
            "recipe": "deformable_detr_r50", "seed": seed, "schedule": schedule,
            "optimizer": {"batch_size": 32, "lr": 2e-4}, "data": {"val": str(val)}, **config,
        },
        "config_digest": "config", "train_digest": "train", "val_digest": val_digest,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(identity))
    start = {"kind": "event", "step": 0, "epoch": 0.0, "time": 1000.0, "event": "start"}
    lines = [{**start, "world": world, "steps": 1, "epochs": len(curve)}]
    parts = {
        "AP50": 1.45, "AP75": 1.08, "AP_S": 0.6, "AP_M": 1.08, "AP_L": 1.32, **(parts or {}),
    }  # fmt: skip
    for epoch, ap in enumerate(curve, 1):
        step, time = epoch * steps_per_epoch, 1000.0 + epoch * step_hours * HOUR
        summary = {"AP": ap, **{name: part * ap for name, part in parts.items()}}
        per_class = {name: ap + (lift or {}).get(name, 0.0) for name in classes}
        train = {"kind": "train", "step": step - 1, "epoch": epoch - 0.1, "time": time - 60.0}
        line = {"kind": "evaluation", "step": step, "epoch": float(epoch), "time": time, **summary}
        lines += [{**train, "loss": 1.0}, {**line, **{f"AP/{n}": v for n, v in per_class.items()}}]
        content = {"epoch": epoch, "summary": summary, "per_class": per_class}
        (folder / "evaluations" / f"step-{step:08d}.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def cell(name, published=None, seed=42, folder=None, differences=None):
    folder = folder or f"cells/{name}-{seed}"
    return {
        "name": name, "folder": folder, "seed": seed, "published": published,
        "differences": differences or {},
    }  # fmt: skip


def write_grid(folder, cells, name="table2", baseline=None):
    folder.mkdir(parents=True, exist_ok=True)
    grid = {"name": name, "baseline": baseline, "cells": cells}
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder


def row_of(comparison, name):
    return next(row for row in comparison.rows if row.cell and row.cell.name == name)


def rich_grid(folder):
    """Compared: a grid with seeds, COCO's number of classes, names full of markup, and a missing
    cell."""
    classes = [HOSTILE, *(f"class {i}" for i in range(79))]
    cells = []
    random = np.random.default_rng(0)
    for name, key, top in (("base", FULL, 0.43), (HOSTILE, "table2/ms_inputs_k4", 0.41)):
        for seed in (1, 2):
            run = f"cells/{key.split('/')[1]}-{seed}"
            cells.append(cell(name, key, seed, run, {"model.num_points": [4, HOSTILE]}))
            curve = (top + random.normal() * 0.002) * (1 - np.exp(-np.arange(1, 13) / 3))
            lift = {c: random.normal() * 0.02 for c in classes}
            write_run(folder / run, curve.tolist(), seed=seed, classes=classes, lift=lift)
    cells.append(cell("gone", "table2/fpn"))
    return compare(read_grid(write_grid(folder, cells, baseline="base")), 0)
