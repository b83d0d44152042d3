"""`python -m pipeline predict`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipeline.cli import parse
from pipeline.errors import UserError


@dataclass(frozen=True)
class PredictOptions:
    checkpoint: Annotated[Path, Positional, arg(metavar="CHECKPOINT")]
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    images: Annotated[tuple[str, ...], Positional, arg(metavar="IMAGES")]
    """Image files, folders of them, or patterns in quotes, such as 'videos/**/*.jpg'."""
    output: Path = Path("predictions")
    """Folder for detections.json, detections.csv and pictures; a new or an empty one."""
    recursive: bool = False
    """Also take the images of subfolders."""
    pictures: bool = True
    """Draw the boxes into copies of the images."""
    threshold: float = 0.3
    """Smallest score that counts, in the files as in the pictures."""
    most: int = 100
    """The best of an image that count, at most."""
    batch_size: int = 0
    """Images in one forward pass. 0: as in the run's own evaluations."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    precision: Literal["", "fp32", "bf16", "fp16"] = ""
    """Empty: as the run was trained."""


def run_predict(args: list[str]) -> None:
    options = parse(
        PredictOptions,
        args,
        "python -m pipeline predict",
        "Finds objects in images: a COCO data set with scores, a table, and pictures with boxes."
        "\n\nExample: python -m pipeline predict runs/r50 photos street.jpg --output found",
    )
    check_prediction(options)
    from pipeline.image_files import find_images
    from pipeline.prediction_files import check_output, writing

    check_output(options.output)
    files = find_images(options.images, options.recursive)
    from pipeline.predict import Detector, naming_checkpoint
    from pipeline.predict_files import predict_files

    detector = Detector.load(options.checkpoint, options.device, options.precision)
    info = {
        "description": "detections by python -m pipeline predict",
        "checkpoint": str(options.checkpoint),
        "images": str(files.folder),
        "threshold": options.threshold,
        "most": options.most,
    }
    started = time.monotonic()
    with (
        naming_checkpoint(options.checkpoint),
        writing(options.output, detector.labels, info) as output,
    ):
        predict_files(
            detector, files, output, options.output / "pictures" if options.pictures else None,
            options.threshold, options.most, options.batch_size,
        )  # fmt: skip
    speed = len(output.images) / (time.monotonic() - started)
    print(
        f"saved {options.output}: {output.objects} objects in {len(output.images)} images, "
        f"{speed:.3g} images/s"
    )
    if not output.objects:
        print(f"nothing has a score of {options.threshold:g}: a lower --threshold shows more")
    if output.left_out:
        raise UserError(
            f"{output.left_out} of {len(files)} images cannot be read and are left out; "
            f"{output.left_out_path} says why of each"
        )


def check_prediction(options: PredictOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold:g}, expected 0 to 1")
    if options.most < 1:
        raise UserError(f"--most: got {options.most}, expected 1 or more")
    if options.batch_size < 0:
        raise UserError(f"--batch-size: got {options.batch_size}, expected 0 or more")
