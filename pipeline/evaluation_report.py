"""A folder that says how good a detector is on a data set, and where it errs.

docs/evaluation.md says what is in each file.
"""

import csv
import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from pipeline.coco_scores import Scores
from pipeline.confusion import Confusion, confusion, save_confusion
from pipeline.curves import curves_of, save_precision
from pipeline.data.shards import ShardSet
from pipeline.error_analysis import KINDS, Errors, analyse
from pipeline.error_chart import save_errors
from pipeline.error_pictures import COLOURS, Picture, draw_worst
from pipeline.evaluate import numbers_table
from pipeline.image_boxes import by_image
from pipeline.whole_file import write_whole

ANALYSED = 100  # detections of each image


@dataclass(frozen=True)
class Report:
    """What an evaluation found. about: of what it is, for the reader. wider: with more detections
    of each image than COCO's 100, where there were more. detections: COCO result records, at most
    100 of each image. threshold: the score from which detections are counted and drawn."""

    about: dict[str, Any]
    truth: COCO
    scores: Scores
    wider: Scores | None
    detections: list[dict[str, Any]]
    errors: Errors
    threshold: float

    def text(self) -> str:
        """The COCO numbers, what the errors cost, and the classes, as text."""
        rows = [numbers_table(self.scores.summary())]
        if self.wider:
            rows.append(f"with the {self.wider.limits[-1]} best of each image")
            rows.append(numbers_table(self.wider.summary()))
        rows.append(
            f"errors: what they cost of AP50 {self.errors.ap:.3f} (dAP), and how many of any score"
        )
        rows += [
            f"  {kind:<16}{self.errors.d_ap[kind]:.3f}  {self.errors.counts[kind]:>8}"
            for kind in KINDS
        ]
        rows.append(f"  {'false positives':<16}{self.errors.false_positives:.3f}")
        rows.append(f"  {'false negatives':<16}{self.errors.false_negatives:.3f}")
        width = max(map(len, self.scores.names))
        rows.append("AP by class")
        for k, name in enumerate(self.scores.names):
            ap = self.scores.of_class(k)["AP"]
            rows.append(f"  {name:<{width}}  {'n/a' if ap < 0 else f'{ap:.3f}'}")
        return "\n".join(rows)


def analysed(
    about: dict[str, Any],
    truth: COCO,
    scores: Scores,
    wider: Scores | None,
    detections: list[dict[str, Any]],
    threshold: float,
) -> Report:
    """The report on detections of which `scores` and `wider` are the scores."""
    errors = analyse(by_image(truth, of_categories(truth, detections), ANALYSED))
    return Report(about, truth, scores, wider, detections, errors, threshold)


def of_categories(truth: COCO, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the ground truth's categories: COCO asks for no others."""
    return [d for d in detections if d["category_id"] in truth.cats]


def write_report(report: Report, shards: ShardSet, folder: Path, pictures: int) -> None:
    """Writes every file of the folder, which must be there; at most `pictures` images."""
    write_whole(folder / "numbers.json", json.dumps(_numbers(report), indent=1))
    names = {k: str(category["name"]) for k, category in report.truth.cats.items()}
    known = of_categories(report.truth, report.detections)
    shown = by_image(report.truth, known, ANALYSED, report.threshold)
    confused = confusion(shown, report.scores.categories, report.scores.names)
    classes = class_rows(report, confused)
    _write_csv(folder / "classes.csv", classes)
    save_precision(curves_of(report.scores), folder)
    save_confusion(confused, folder)
    save_errors(report.errors, names, folder)
    (folder / "images").mkdir(exist_ok=True)
    drawn = draw_worst(shards, shown, names, folder / "images", pictures)
    write_whole(folder / "evaluation.html", page(report, classes, drawn))


def _numbers(report: Report) -> dict[str, Any]:
    numbers = {**report.about, "top_100": report.scores.summary()}
    if report.wider:
        numbers[f"top_{report.wider.limits[-1]}"] = report.wider.summary()
    errors = report.errors
    numbers["errors"] = {
        "AP50": errors.ap,
        "dAP": {
            **errors.d_ap,
            "false_positives": errors.false_positives,
            "false_negatives": errors.false_negatives,
        },
        "counts": errors.counts,
    }
    return numbers


def class_rows(report: Report, confused: Confusion) -> list[dict[str, Any]]:
    """One for each category: its objects without crowds, its COCO numbers, and of the detections
    of the threshold and above the precision and recall at IoU 0.5. None where undefined."""
    objects = Counter(
        a["category_id"] for a in report.truth.dataset["annotations"] if not a["iscrowd"]
    )
    precision, recall = confused.precision(), confused.recall()
    rows = []
    for k, (category, name) in enumerate(
        zip(report.scores.categories, report.scores.names, strict=True)
    ):
        numbers = report.scores.of_class(k)
        if report.wider:
            limit = report.wider.limits[-1]
            wider = report.wider.of_class(k)
            numbers |= {f"AP@{limit}": wider["AP"], f"AR_{limit}": wider[f"AR_{limit}"]}
        numbers |= {
            "precision": -1.0 if np.isnan(precision[k]) else float(precision[k]),
            "recall": -1.0 if np.isnan(recall[k]) else float(recall[k]),
        }
        defined = {name: None if value < 0 else value for name, value in numbers.items()}
        rows.append({"class": name, "objects": objects[category], **defined})
    return rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 24px auto; padding: 0 16px;
  color: #222; background: #fff; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 32px; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 0 0 24px; } figcaption { color: #555; font-size: 13px; }
.about td:last-child { text-align: left; overflow-wrap: anywhere; }
.key { padding: 1px 8px; margin-right: 6px; color: #000; font-size: 13px; }
"""


def page(report: Report, classes: Sequence[dict[str, Any]], drawn: Sequence[Picture]) -> str:
    """evaluation.html; its pictures lie beside it."""
    numbers = [_coco_row(of) for of in (report.scores, report.wider) if of]
    costs = [
        {"error": kind, "dAP": report.errors.d_ap[kind], "detections": report.errors.counts[kind]}
        for kind in KINDS
    ]
    costs[-1]["error"] = "missed (objects)"
    worst_first = sorted(classes, key=lambda row: 2.0 if row["AP"] is None else row["AP"])
    keys = "".join(
        f"<span class='key' style='background:{colour}'>{name}</span>"
        for name, colour in COLOURS.items()
    )
    at = f"score {report.threshold:g} or more"
    parts = [
        "<h1>Evaluation</h1>",
        _rows_of_two(report.about),
        "<h2>COCO numbers</h2>",
        _table(numbers),
        "<h2>Errors</h2>",
        "<p>AP50 that is won where all errors of a kind were mended and the others stayed (TIDE)."
        "</p>",
        _picture("errors.png"),
        _table(costs),
        "<h2>Precision and recall</h2>",
        _picture("precision_recall.png"),
        f"<h2>Confusion</h2><p>Detections of {at}, IoU 0.5.</p>",
        _picture("confusion.png"),
        f"<h2>Classes, the worst first</h2><p>Precision and recall: of {at}, IoU 0.5.</p>",
        _table(worst_first),
        f"<h2>Images with the most errors</h2><p>Detections of {at}: {keys}</p>",
        *(
            _picture(f"images/{p.path.name}", f"{i}. image {p.image_id}: {p.said()}")
            for i, p in enumerate(drawn, 1)
        ),
    ]
    if not drawn:
        parts.append("<p>None is drawn.</p>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Evaluation</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _coco_row(scores: Scores) -> dict[str, Any]:
    most = scores.limits[-1]
    numbers = {"AR" if n == f"AR_{most}" else n: v for n, v in scores.summary().items()}
    return {"best of each image": most} | {n: v if v >= 0 else None for n, v in numbers.items()}


def _picture(name: str, said: str = "") -> str:
    caption = f"<figcaption>{html.escape(said)}</figcaption>" if said else ""
    return f"<figure>{caption}<img src='{html.escape(name)}' alt='{html.escape(name)}'></figure>"


def _rows_of_two(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table class='about'>{rows}</table>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "n/a"
        return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
