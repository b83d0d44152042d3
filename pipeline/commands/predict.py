"""`python -m pipeline predict`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import parse
from pipeline.errors import UserError


@dataclass(frozen=True)
class PredictOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, whose images are drawn."""
    output: Path = Path("predictions.png")
    count: int = 6
    """Number of images, spread over the set."""
    threshold: float = 0.3
    """Smallest score that is drawn."""
    device: str = "auto"


def run_predict(args: list[str]) -> None:
    options = parse(
        PredictOptions,
        args,
        "python -m pipeline predict",
        "Draws a checkpoint's predictions beside the ground truth.\n\nExample: "
        "python -m pipeline predict --checkpoint runs/r50 --data shards/val --output out.png",
    )
    check_picture(options.output)
    from pipeline.predict import Detector
    from pipeline.visualize import draw_predictions

    detector = Detector.load(options.checkpoint, options.device)
    shards = detector.open(options.data)
    draw_predictions(
        detector.model, shards, detector.labels, detector.config, detector.device,
        options.output, options.count, options.threshold,
    )  # fmt: skip
    print(f"saved {options.output}")


def check_picture(output: Path) -> None:
    """Raises `UserError` where no picture can be saved."""
    known = (".png", ".jpg", ".jpeg", ".webp")
    if output.is_dir() or output.suffix.lower() not in known:
        raise UserError(f"--output: got {output}, expected a file ending in {', '.join(known)}")
    if not output.parent.is_dir():
        raise UserError(f"--output: folder {str(output.parent)!r} does not exist")
