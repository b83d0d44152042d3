"""What came of a training on own data: report.md, and the end of the command's output."""

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluate import Evaluation, table
from pipeline.tracking import read_lines
from pipeline.whole_file import write_whole


@dataclass(frozen=True)
class Prepared:
    """What was said before training, in lines: `found` in the data, `findings` of the label check,
    `defaults` with their reasons, `weights` to start from."""

    found: list[str]
    findings: list[str]
    defaults: list[str]
    weights: str


def found(train: dict[str, Any], val: dict[str, Any]) -> list[str]:
    """What two annotation files hold: images, objects, and objects by class."""
    names = {c["id"]: str(c["name"]) for c in train["categories"]}
    counts = []
    lines = []
    for part, content in (("train", train), ("val", val)):
        objects = [a for a in content.get("annotations") or [] if a.get("category_id") in names]
        count = Counter(names[a["category_id"]] for a in objects)
        empty = len(content["images"]) - len({a.get("image_id") for a in objects})
        lines.append(
            f"{part}: {len(content['images'])} images, {empty} of them without objects; "
            f"{count.total()} objects"
        )
        counts.append(count)
    width = max(map(len, names.values()))
    lines.append(f"{'class':<{width}}  {'train':>7}  {'val':>7}")
    lines += [f"{n:<{width}}  {counts[0][n]:>7}  {counts[1][n]:>7}" for n in names.values()]
    return lines


def report(output: Path, prepared: Prepared, command: list[str]) -> str:
    """Writes `output/report.md`, and returns its end as text for a terminal."""
    run = output / "run"
    best = json.loads((run / "best.json").read_text(encoding="utf-8"))
    numbers = table(Evaluation(best["summary"], best["per_class"], []))
    lines = read_lines(run / "metrics.jsonl")
    said = [line["text"] for line in lines if line.get("event") == "message"]
    checks = [*prepared.findings, *(text for text in said if text.startswith("label check"))]
    following = list(_next_commands(output, command))
    parts = [
        "# Trained on own data",
        f"Made by `{shlex.join(command)}`.",
        f"## AP of the best epoch ({best['epoch']}) on val",
        _fenced(numbers),
        *(f"{advice}" for advice in advice_of(lines, best["epoch"])),
        "## Predictions beside the ground truth",
        "![predictions](run/predictions.png)",
        "## Label check",
        "\n".join(f"- {text}" for text in checks) or "Nothing looks wrong.",
        "## Data",
        _fenced("\n".join(prepared.found)),
        "## Defaults, and why",
        "\n".join(f"- `{text.replace(': ', '`: ', 1)}" for text in prepared.defaults),
        prepared.weights,
        "## Next",
        _fenced("\n".join(following)),
    ]
    write_whole(output / "report.md", "\n\n".join(parts) + "\n")
    return "\n".join(
        [
            "",
            *checks,
            *advice_of(lines, best["epoch"]),
            f"report           {output / 'report.md'}",
            f"best checkpoint  {run / 'checkpoints' / best['checkpoint']}",
            f"predictions      {run / 'predictions.png'}",
            "next:",
            *(f"  {line}" for line in following),
        ]
    )


def _fenced(text: str) -> str:
    return f"```\n{text}\n```"


def advice_of(lines: list[dict[str, Any]], best_epoch: int) -> Iterator[str]:
    """What the course of AP says about the length of the training."""
    curve = [(line["epoch"], line["AP"]) for line in lines if line["kind"] == "evaluation"]
    last = int(max(epoch for epoch, _ in curve))
    if best_epoch >= 0.95 * last:
        yield f"AP was best at the end (epoch {best_epoch} of {last}): more epochs may give more."
    elif best_epoch <= 0.5 * last:
        yield (
            f"AP was best early (epoch {best_epoch} of {last}): fewer epochs or a lower "
            f"--optimizer.lr would do, and more images would help."
        )


def _next_commands(output: Path, command: list[str]) -> Iterator[str]:
    run, shards = output / "run", output / "shards"
    yield f"python -m pipeline predict {run} IMAGES --output predictions"
    yield f"python -m pipeline evaluate {run} --data {shards / 'val'}"
    yield f"python -m jobs resume {run}  # after an interruption"
    yield "# more epochs: a new run from this one's weights"
    yield shlex.join(again(command, {"--weights": str(run), "--output": f"{output}-more"}))


def again(command: list[str], changed: dict[str, str]) -> list[str]:
    """The command with other values of some options."""
    kept, given = [], iter(command)
    for argument in given:
        if argument in changed:
            next(given, None)
        elif argument.split("=")[0] not in changed:
            kept.append(argument)
    return [*kept, *(x for pair in changed.items() for x in pair)]
