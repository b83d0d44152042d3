"""`python -m pipeline evaluate`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cli import parse
from pipeline.errors import UserError


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoint: Path
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, to evaluate on."""
    output: Path | None = None
    """Also write the detections as a COCO result file."""
    tta: bool = False
    """Test-time augmentation: each image mirrored, too, and the detections merged."""
    tta_sides: tuple[int, ...] = ()
    """With --tta: the shorter sides, in pixels, in which each image is seen. Empty: as trained."""
    device: str = "auto"
    batch_size: int = 0
    """Images in one forward pass. 0: as in the run's own evaluations."""


def run_evaluate(args: list[str]) -> None:
    options = parse(
        EvaluateOptions,
        args,
        "python -m pipeline evaluate",
        "Prints the COCO numbers of a checkpoint. Data without annotations (COCO's test-dev) only "
        "gives a result file.\n\nExample: python -m pipeline evaluate --checkpoint runs/r50 "
        "--data shards/val --tta --tta-sides 600 800 1000",
    )
    check_evaluation(options)
    from pipeline.augmented_evaluation import detect_augmented
    from pipeline.evaluate import detect, ground_truth, summarize, table
    from pipeline.predict import Detector

    detector = Detector.load(options.checkpoint, options.device)
    config = detector.config
    if options.batch_size:
        engine = replace(config.engine, evaluation_batch=options.batch_size)
        config = replace(config, engine=engine)
    shards = detector.open(options.data)
    truth = ground_truth(shards)
    if not truth.anns and not options.output:
        raise UserError(
            f"{options.data} has no annotations, so there is nothing to compare with; "
            f"--output FILE writes the detections"
        )
    given = (detector.model, shards, detector.labels, config, detector.device)
    detections = detect_augmented(*given, options.tta_sides) if options.tta else detect(*given)
    if options.output:
        options.output.write_text(json.dumps(detections), encoding="utf-8")
    if truth.anns:
        print(table(summarize(truth, detections)))
    else:
        print(f"{options.data} has no annotations: {len(shards)} images, no COCO numbers")
    if options.output:
        print(f"saved {len(detections)} detections in {options.output}")


def check_evaluation(options: EvaluateOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    if options.tta_sides and not options.tta:
        raise UserError("--tta-sides: got sizes without --tta, which they are for")
    if any(side < 1 for side in options.tta_sides):
        raise UserError(f"--tta-sides: got {options.tta_sides}, expected pixels, 1 or more")
    if options.batch_size < 0:
        raise UserError(f"--batch-size: got {options.batch_size}, expected 0 or more")
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output: folder {str(options.output.parent)!r} does not exist")
