"""Detections on disk as they are found: a COCO data set, a table, and pictures.

A folder of 100,000 images takes no more memory than their names.
"""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image

from pipeline.data.images import decode_as_shown
from pipeline.data.labels import Labels
from pipeline.drawing import Label, save, with_boxes
from pipeline.errors import UserError
from pipeline.image_files import ImageFiles
from pipeline.machine_errors import naming
from pipeline.predict import Detections

COLUMNS = (
    "file_name", "width", "height", "category_id", "label", "score", "x0", "y0", "x1", "y1",
)  # fmt: skip
WRITTEN = (".jpg", ".jpeg", ".png", ".webp")  # a picture of another kind is written as .png, too


@dataclass
class PredictionFiles:
    """`detections.json` and `detections.csv` of a folder, an image after the other.

    The JSON file is a whole COCO data set, with a `score` in each annotation: `images` says which
    file an `image_id` is, and tools that load data sets load it. Coordinates are rounded to a
    thousandth of a pixel, scores to six digits.
    """

    json_file: IO[str]
    csv_file: IO[str]
    left_out_path: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    objects: int = 0
    left_out: int = 0

    def add(self, name: str, found: Detections) -> None:
        image_id = len(self.images) + 1
        size = {"width": found.width, "height": found.height}
        self.images.append({"id": image_id, "file_name": _slashes(name), **size})
        scores, boxes = found.scores.round(6).tolist(), found.boxes.round(3).tolist()
        table = csv.writer(self.csv_file, lineterminator="\n")
        for label, category, score, (x0, y0, x1, y1) in zip(
            found.labels, found.category_ids, scores, boxes, strict=True
        ):
            self.objects += 1
            width, height = round(x1 - x0, 3), round(y1 - y0, 3)
            annotation = {
                "id": self.objects, "image_id": image_id, "category_id": category,
                "bbox": [x0, y0, width, height], "area": round(width * height, 3), "iscrowd": 0,
                "score": score,
            }  # fmt: skip
            comma = "," if self.objects > 1 else ""
            self.json_file.write(f"{comma}\n{json.dumps(annotation)}")
            row = (_slashes(name), found.width, found.height, category, label, score)
            table.writerow((*row, x0, y0, x1, y1))

    def leave_out(self, name: str, why: str) -> None:
        """Adds to `left_out.csv`."""
        self.left_out += 1
        with _opened(self.left_out_path, "a") as file:
            table = csv.writer(file, lineterminator="\n")
            if self.left_out == 1:
                table.writerow(("file_name", "why"))
            table.writerow((_slashes(name), why))


@contextmanager
def writing(folder: Path, labels: Labels, info: dict[str, Any]) -> Iterator[PredictionFiles]:
    """The files of a folder that is made, or empty. Until all is written they end in `.partial`.

    info: of the JSON file."""
    folder.mkdir(exist_ok=True)
    paths = [folder / "detections.json", folder / "detections.csv"]
    aside = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        json_file = _opened(aside[0], "x")
    except FileExistsError:
        raise UserError(
            f"--output: got {folder}, to which another command has begun to write, expected a new "
            f"folder or an empty one; give another"
        ) from None
    with naming(folder), json_file, _opened(aside[1], "w") as csv_file:
        categories = [
            {"id": category, "name": name}
            for category, name in zip(labels.category_of, labels.names, strict=True)
            if category >= 0
        ]
        head = json.dumps({"info": info, "categories": categories})
        json_file.write(f'{head[:-1]}, "annotations": [')
        csv.writer(csv_file, lineterminator="\n").writerow(COLUMNS)
        files = PredictionFiles(json_file, csv_file, folder / "left_out.csv")
        yield files
        images = ",\n".join(json.dumps(image) for image in files.images)
        json_file.write(f'\n], "images": [\n{images}\n]}}\n')
    for path, partial in zip(paths, aside, strict=True):
        os.replace(partial, path)


def _opened(path: Path, mode: str) -> IO[str]:
    # A name of a file may be bytes that are no text.
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")


def _slashes(name: str) -> str:
    return name.replace(os.sep, "/")


def check_output(folder: Path) -> None:
    """Raises `UserError` where results of another command could get mixed with these."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: got the file {folder}, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"--output: got {folder}, which has files, expected a new folder or an empty one; "
            f"remove it, or give another"
        )
    if not folder.parent.is_dir():
        raise UserError(f"--output: folder {str(folder.parent)!r} does not exist")


def picture_names(files: ImageFiles) -> dict[str, str]:
    """The name of each image's picture: its own, with .png added where it is of a kind that is not
    written, as often as makes it a new one."""
    taken = {name for name in files.names if name.lower().endswith(WRITTEN)}
    names = {name: name for name in taken}
    for name in files.names:
        if name not in names:
            names[name] = f"{name}.png"
            while names[name] in taken:
                names[name] += ".png"
            taken.add(names[name])
    return names


def save_picture(source: Path, output: Path, found: Detections, labels: Labels) -> None:
    """The image as a viewer shows it, with the boxes and their names and scores."""
    image = Image.fromarray(decode_as_shown(source.read_bytes())[0].permute(1, 2, 0).numpy())
    column_of = labels.column_of()
    drawn = []
    for name, category, score, box in zip(
        found.labels, found.category_ids, found.scores, found.boxes.tolist(), strict=True
    ):
        x0, y0, x1, y1 = box
        drawn.append(Label((x0, y0, x1, y1), column_of[category], f"{name} {score:.2f}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    save(with_boxes(image, drawn), output, quality=90, compress_level=1)
