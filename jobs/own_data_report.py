"""What came of a training on own data: report.md, and the end of the command's output."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.objects import objects
from pipeline.tracking import read_lines
from pipeline.whole_file import write_whole


@dataclass(frozen=True)
class Prepared:
    """What was said before training, in lines: `found` in the data, `findings` of the label check,
    `defaults` with their reasons, `weights` to start from; and `epochs` of the training, and
    whether the pictures lie in `subfolders`."""

    found: list[str]
    findings: list[str]
    defaults: list[str]
    weights: str
    epochs: int
    subfolders: bool


def in_shards(content: dict[str, Any], image_ids: Iterable[int]) -> dict[str, Any]:
    """Of an annotation file, the images that the conversion took and their annotations."""
    taken = set(image_ids)
    # The first record of an id is the one that was taken.
    images = {i["id"]: i for i in reversed(content["images"]) if i["id"] in taken}
    annotations = content.get("annotations") or []
    return {
        **content,
        "images": list(images.values()),
        "annotations": [
            a for a in annotations if type(a.get("image_id")) is int and a["image_id"] in taken
        ],
    }


def found(
    train: dict[str, Any], val: dict[str, Any], left_out: tuple[int, int] = (0, 0)
) -> list[str]:
    """What two annotation files hold: images, objects, and objects by class.

    left_out: images of each that are not in it any more.
    """
    names = {c["id"]: str(c["name"]) for c in train["categories"]}
    counts = []
    lines = []
    for part, content, fewer in (("train", train, left_out[0]), ("val", val, left_out[1])):
        trained = objects(content.get("annotations") or [], names)
        count = Counter(names[a["category_id"]] for a in trained)
        empty = len(content["images"]) - len({a.get("image_id") for a in trained})
        lines.append(
            f"{part}: {len(content['images'])} images, {empty} of them without objects; "
            f"{count.total()} objects" + (f" ({fewer} more images are left out)" if fewer else "")
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
    from pipeline.evaluate import Evaluation, table  # brings torch

    numbers = table(Evaluation(best["summary"], best["per_class"], []))
    lines = read_lines(run / "metrics.jsonl")
    said = [line["text"] for line in lines if line.get("event") == "message"]
    checks = [*prepared.findings, *(text for text in said if text.startswith("label check"))]
    following = list(next_commands(output, command, prepared))
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


def next_commands(output: Path, command: list[str], prepared: Prepared) -> Iterator[str]:
    """What can be done with the run, as lines for a shell. command: that which trained it."""
    run, shards = output / "run", output / "shards"
    below = " --recursive" if prepared.subfolders else ""
    yield shlex.join(["python", "-m", "pipeline", "predict", str(run)]) + (
        f" IMAGES{below} --output predictions"
    )
    yield shlex.join(
        ["python", "-m", "pipeline", "evaluate", str(run), "--data", str(shards / "val")]
    )
    yield shlex.join(["python", "-m", "jobs", "resume", str(run)]) + "  # after an interruption"
    yield "# more epochs: a new run from this one's weights"
    changed = {
        "--weights": str(run),
        "--output": f"{output}-more",
        "--schedule.epochs": str(2 * prepared.epochs),
    }
    yield shlex.join(again(command, changed))


def again(command: list[str], changed: dict[str, str]) -> list[str]:
    """The command with other values of some options."""
    kept, given = [], iter(command)
    for argument in given:
        if argument in changed:
            next(given, None)
        elif argument.split("=")[0] not in changed:
            kept.append(argument)
    return [*kept, *(x for pair in changed.items() for x in pair)]
