"""`python -m pipeline visualize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from pipeline.cli import parse
from pipeline.errors import UserError


@dataclass(frozen=True)
class VisualizeOptions:
    checkpoint: Annotated[Path, Positional]
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, whose images are looked at."""
    output: Path = Path("figures")
    """Folder for the pictures."""
    image_ids: tuple[int, ...] = ()
    """Ids of the images. None: --count of them."""
    count: int = 4
    """Number of images, spread over the set."""
    objects: int = 3
    """The best of an image that are drawn, at most."""
    threshold: float = 0.3
    """Smallest score that is drawn."""
    device: str = "auto"


def run_visualize(args: list[str]) -> None:
    options = parse(
        VisualizeOptions,
        args,
        "python -m pipeline visualize",
        "Draws what a checkpoint looks at: the gradient of each box and class with respect to the "
        "pixels, the sampling points of encoder and decoder, and predictions beside the ground "
        "truth.\n\nExample: python -m pipeline visualize runs/r50 --data shards/val "
        "--image-ids 139 285 --output figures",
    )
    check_figures(options)
    from pipeline.look_inside import choose_images, look_inside
    from pipeline.predict import Detector, naming_checkpoint

    detector = Detector.load(options.checkpoint, options.device)
    shards = detector.open(options.data)
    indices = choose_images(shards, options.image_ids, options.count)
    with naming_checkpoint(options.checkpoint):
        look_inside(detector, shards, indices, options.output, options.objects, options.threshold)


def check_figures(options: VisualizeOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    for name, value in (("count", options.count), ("objects", options.objects)):
        if value < 1:
            raise UserError(f"--{name}: got {value}, expected 1 or more")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold:g}, expected 0 to 1")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output: got the file {options.output}, expected a folder")
    if not options.output.parent.is_dir():
        raise UserError(f"--output: folder {str(options.output.parent)!r} does not exist")
