"""One annotation file -> one to train on and one to validate, each with every class if it can be.

Iterative stratification for several labels an image (Sechidis, Tsoumakas and Vlahavas, "On the
Stratification of Multi-Label Data", 2011): the class that has fewest images left is dealt out
first. Records stay the bytes they were.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_prep.checks import annotation_problems
from data_prep.coco import CocoFile, category_ids, read_coco
from data_prep.shards import split_record
from data_prep.storage import folder_at

TRAIN, VAL = "train.json", "val.json"
FOLDER = "folder"
Unit = frozenset[Any]
"""Labels of what goes into one part as a whole: an image, or a group of them."""


@dataclass(frozen=True)
class Split:
    """Numbers of images, and the names of classes that only one of the parts has."""

    train: int
    val: int
    only_in_train: list[str]
    only_in_val: list[str]


def split(
    annotations: Path, output: Path, *, share: float = 0.2, seed: int = 0, by: str = ""
) -> Split:
    """Write `output/train.json` and `output/val.json`; equal input and options give equal files.

    Args:
        annotations: a local file in COCO's format.
        output: folder for the two; files of an earlier split there are written anew.
        share: of the images that validation gets.
        seed: of the order in which equal images are taken.
        by: images that agree in this stay together: a field of the image records such as
            "video_id", or "folder" for the folder in file_name. Empty: each image alone.

    Raises:
        ValueError: the file is unusable, an image lacks the field, or there are fewer than two
            images or groups.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: got {share:g}, expected a number between 0 and 1, such as 0.2")
    coco = read_coco(annotations)
    records = [coco.sample_json(i) for i in range(len(coco.images))]
    labels = [_labels(record, set(category_ids(coco.header["categories"], coco.origin)))
              for record in records]  # fmt: skip
    groups = _groups(records, by)
    if len(groups) < 2:
        what = f"groups by {by!r}" if by else "images"
        raise ValueError(
            f"{annotations}: got {len(groups)} {what}, expected two or more to split; give a "
            f"validation set of its own"
        )
    units = [frozenset().union(*(labels[i] for i in group)) for group in groups]
    chosen = stratified(units, share, seed)
    val = {i for unit in chosen for i in groups[unit]}
    train = [i for i in range(len(records)) if i not in val]
    output.mkdir(parents=True, exist_ok=True)
    _write(coco, records, train, coco.orphans, output / TRAIN)
    _write(coco, records, sorted(val), [], output / VAL)
    in_train, in_val = (set().union(*(labels[i] for i in part)) for part in (train, val))
    # A lone surrogate is legal in JSON and cannot be printed.
    names = {
        c["id"]: c["name"].encode("utf-8", "replace").decode() for c in coco.header["categories"]
    }
    return Split(
        len(train),
        len(val),
        [names[c] for c in sorted(in_train - in_val)],
        [names[c] for c in sorted(in_val - in_train)],
    )


def stratified(units: Sequence[Unit], share: float, seed: int) -> set[int]:
    """The units, by index, of the smaller part: about `share` of all and of those of each label.

    A label that two or more units have is in both parts, where that can be for all labels together
    or a few exchanges find how.
    """
    # Units without a label are dealt out, too: they have this one.
    labels = [unit or frozenset([None]) for unit in units]
    order = list(range(len(units)))
    random.Random(seed).shuffle(order)
    holders: dict[Any, list[int]] = {}
    for unit in order:
        for label in labels[unit]:
            holders.setdefault(label, []).append(unit)
    total = {label: len(holders[label]) for label in sorted(holders, key=str)}
    wanted = {label: _wanted(count, share) for label, count in total.items()}
    room = _wanted(len(units), share)
    left, dealt, chosen = Counter(total), set[int](), set[int]()
    while left := +left:
        rarest = min(left, key=lambda x: left[x])
        for unit in holders[rarest]:
            if unit in dealt:
                continue
            dealt.add(unit)
            left.subtract(labels[unit])
            # What it brings to labels that still want some, against what it is too much of.
            gain = sum(1 if wanted[x] > 0 else -1 for x in labels[unit])
            none_yet = wanted[rarest] == _wanted(total[rarest], share)
            if wanted[rarest] > 0 and (none_yet or (room > 0 and gain >= 0)):
                chosen.add(unit)
                room -= 1
                for label in labels[unit]:
                    wanted[label] -= 1
    if not chosen:  # every class has one image only
        chosen = set(order[:room])
    return _repaired(labels, chosen, total)


def _wanted(count: int, share: float) -> int:
    """How many of `count` the smaller part is to have: of two or more, each part one."""
    return min(max(round(share * count), 1), count - 1)


def _repaired(labels: Sequence[Unit], chosen: set[int], total: Mapping[Any, int]) -> set[int]:
    """`chosen` after exchanges that bring a label into the part that lacks it, and take none out
    of a part that had it."""
    inside = Counter(label for i in chosen for label in labels[i])

    def move(unit: int) -> None:
        chosen.symmetric_difference_update([unit])
        step = 1 if unit in chosen else -1
        for label in labels[unit]:
            inside[label] += step

    def lacking() -> int:
        return sum(count >= 2 and inside[x] in (0, count) for x, count in total.items())

    for label, count in total.items():
        if count < 2 or 0 < inside[label] < count:
            continue
        for unit in [i for i in range(len(labels)) if label in labels[i]]:
            before = lacking()
            move(unit)
            if lacking() < before:
                break
            move(unit)
    return chosen


def _labels(record: bytes, categories: set[int]) -> Unit:
    annotations = json.loads(record)["annotations"]
    return frozenset(
        a["category_id"]
        for a in annotations
        if not a.get("iscrowd") and not any(annotation_problems(a, None, categories))
    )


def _groups(records: Sequence[bytes], by: str) -> list[list[int]]:
    """Indices of images that stay together, in the order of their first."""
    if not by:
        return [[i] for i in range(len(records))]
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        image = json.loads(record)["image"]
        if by == FOLDER:
            key = str(PurePosixPath(image["file_name"]).parent)
        elif by in image:
            key = json.dumps(image[by], sort_keys=True)
        else:
            raise ValueError(
                f"by: image {image['id']} has no field {by!r}; expected one of "
                f"{', '.join(image)}, or {FOLDER!r} for the folder in file_name"
            )
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _write(
    coco: CocoFile, records: Sequence[bytes], part: Sequence[int], orphans: list[Any], path: Path
) -> None:
    """The annotation file of the images in `part`, records of a repeated id among them."""
    ids = {coco.images[i].id for i in part}
    repeated = [coco.data[slice(*r.span)] for r in coco.repeated if r.id in ids]

    def images() -> Iterator[bytes]:
        yield from (split_record(records[i])[0] for i in part)
        yield from repeated

    def annotations() -> Iterator[bytes]:
        for i in part:
            yield from split_record(records[i])[1]
        yield from (json.dumps(orphan).encode() for orphan in orphans)

    lists: dict[str, Callable[[], Iterator[bytes]]]
    lists = {"images": images, "annotations": annotations}
    with folder_at(path.parent).new_file(path.name, ".") as aside, aside.open("wb") as file:
        for n, key in enumerate(coco.keys):
            file.write((b", " if n else b"{") + json.dumps(key).encode() + b": ")
            if key in lists:
                _write_list(file, lists[key]())
            else:
                file.write(json.dumps(coco.header[key]).encode())
        file.write(b"}\n")


def _write_list(file: BinaryIO, rows: Iterator[bytes]) -> None:
    file.write(b"[")
    for n, row in enumerate(rows):
        file.write((b",\n" if n else b"") + row)
    file.write(b"]")
