"""`python -m pipeline evaluate`."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from pipeline.cli import parse
from pipeline.errors import UserError
from pipeline.machine_errors import naming

if TYPE_CHECKING:
    import torch
    from pycocotools.coco import COCO

    from pipeline.data.shards import ShardSet
    from pipeline.predict import Detector

Records = list[dict[str, Any]]  # COCO's, of detections
WIDER = 300  # detections of each image, beside COCO's 100


@dataclass(frozen=True)
class EvaluateOptions:
    checkpoint: Annotated[Path, Positional]
    """A run folder (its best checkpoint), a checkpoint in it, or a model.pt."""
    data: str
    """Shard folder, or its URL, to evaluate on."""
    output: Path | None = None
    """Folder to write: evaluation.html, the numbers, curves, confusion, errors, and the images with
    the most errors. It must be new or empty."""
    results: Path | None = None
    """COCO result file to write, the 100 best detections of each image. It must be new."""
    weights: Literal["average", "plain"] = "average"
    """Of a run with averaged weights: the average, or the weights that it was training."""
    threshold: float = 0.3
    """Smallest score of detections that the confusion matrix counts and the images show."""
    images: int = 24
    """With --output: how many images are drawn, those with the most errors."""
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
        "COCO numbers of a checkpoint, by size and class, and what its errors cost. Data without "
        "annotations (COCO's test-dev) only gives a result file. Under torchrun the processes "
        "share the images.\n\nExample: python -m pipeline evaluate runs/r50 --data shards/val "
        "--output evaluation",
    )
    check_evaluation(options)
    from pipeline.evaluate import ground_truth
    from pipeline.predict import naming_checkpoint

    detector = loaded(options)
    shards = detector.open(options.data)
    truth = ground_truth(shards)
    check_objects(truth, options)
    rank, world = join_group(detector.device)
    if world > 1:
        share_weights(detector)
    if rank == 0 and options.output:
        options.output.mkdir(exist_ok=True)
    with naming_checkpoint(options.checkpoint):
        found = detected(detector, shards, options, rank, world)
    if found is None:  # process 0 has them
        return
    best, more = found
    files = [f for f in (options.results, options.output and options.output / "results.json") if f]
    for file in files:  # at once: an analysis that fails does not take them along
        with naming(file):
            file.write_text(json.dumps(best), encoding="utf-8")
    if truth.anns:
        averaged = options.weights == "average" and detector.config.optimizer.ema_decay > 0
        tell(truth, best, more, shards, "average" if averaged else "plain", options)
    else:
        print(f"{options.data} has no annotations: {len(shards)} images, no COCO numbers")
    for file in files:
        print(f"saved {len(best)} detections in {file}")


def tell(
    truth: "COCO",
    best: Records,
    more: Records,
    shards: "ShardSet",
    weights: str,
    options: EvaluateOptions,
) -> None:
    """Prints the numbers, and writes the folder where one was asked for."""
    from pipeline.coco_scores import score
    from pipeline.evaluation_report import analysed, write_report

    wider = score(truth, more, WIDER) if len(more) > len(best) else None
    about = {
        "checkpoint": str(options.checkpoint), "weights": weights, "data": options.data,
        "images": len(shards), "objects": sum(not a["iscrowd"] for a in truth.anns.values()),
        "test-time augmentation": "yes" if options.tta else "no",
    }  # fmt: skip
    report = analysed(about, truth, score(truth, best), wider, best, options.threshold)
    print(report.text())
    if options.output:
        write_report(report, shards, options.output, options.images)
        print(f"saved {options.output / 'evaluation.html'}")


def loaded(options: EvaluateOptions) -> "Detector":
    """The detector, with the weights that were asked for."""
    from pipeline.checkpoint_store import load_plain
    from pipeline.predict import Detector

    detector = Detector.load(options.checkpoint, options.device)
    if options.weights == "plain" and (plain := load_plain(options.checkpoint)):
        detector.model.load_state_dict(plain)
    if not options.batch_size:
        return detector
    engine = replace(detector.config.engine, evaluation_batch=options.batch_size)
    return replace(detector, config=replace(detector.config, engine=engine))


def join_group(device: "torch.device") -> tuple[int, int]:
    """(rank, world size) of torchrun's processes; (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from pipeline.engine import start_process_group

    return start_process_group(device)


def share_weights(detector: "Detector") -> None:
    """Gives every process those of process 0 (collective): the run may be training, and have had
    another best checkpoint when this one looked."""
    import torch.distributed as dist

    for tensor in detector.model.state_dict().values():
        dist.broadcast(tensor, src=0)


def detected(
    detector: "Detector", shards: "ShardSet", options: EvaluateOptions, rank: int, world: int
) -> list[Records] | None:
    """COCO result records of all images on rank 0, None elsewhere (collective): the 100 best of
    each image, and the `WIDER` best where there are as many."""
    from pipeline.augmented_evaluation import detect_augmented
    from pipeline.engine import stop_process_group
    from pipeline.evaluate import detect_best, gather

    given = (detector.model, shards, detector.labels, detector.config, detector.device)
    if options.tta:
        merged = detect_augmented(*given, options.tta_sides)  # the 100 best alone
        return [merged, merged]
    mine = detect_best(*given, rank, world, lambda: None, (100, WIDER))
    every = [gather(detections) for detections in mine]
    stop_process_group()
    return None if rank else [part for part in every if part is not None]


def check_evaluation(options: EvaluateOptions) -> None:
    """Raises `UserError` for what can be seen before anything is loaded."""
    if options.tta_sides and not options.tta:
        raise UserError("--tta-sides: got sizes without --tta, which they are for")
    if any(side < 1 for side in options.tta_sides):
        raise UserError(f"--tta-sides: got {options.tta_sides}, expected pixels, 1 or more")
    if options.tta and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--tta: runs in one process; leave torchrun out")
    for name, value in (("batch-size", options.batch_size), ("images", options.images)):
        if value < 0:
            raise UserError(f"--{name}: got {value}, expected 0 or more")
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold: got {options.threshold:g}, expected 0 to 1")
    output, results = options.output, options.results
    if output and output.suffix == ".json":
        raise UserError(f"--output {output}: expected a folder; --results FILE writes detections")
    for name, path in (("output", output), ("results", results)):
        if path and not path.parent.is_dir():
            raise UserError(f"--{name}: folder {str(path.parent)!r} does not exist")
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already; remove it, or choose another")
    if results and results.exists():
        raise UserError(f"--results {results} is there already; remove it, or choose another")


def check_objects(truth: "COCO", options: EvaluateOptions) -> None:
    """Raises `UserError` where nothing could be said about detections, or written."""
    if not truth.anns and (options.output or not options.results):
        raise UserError(
            f"{options.data} has no annotations, so there is nothing to compare with; "
            f"--results FILE writes the detections"
        )
    if truth.anns and all(annotation["iscrowd"] for annotation in truth.anns.values()):
        raise UserError(f"{options.data}: got crowds alone, expected at least one single object")
