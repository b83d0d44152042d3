"""What a checkpoint looks at in some images: the paper's Figures 5 and 6, and its predictions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from model.postprocess import class_scores
from pipeline.data.augment import resize_for_evaluation
from pipeline.data.batch import Batch, collate, decode
from pipeline.data.shards import ShardSet
from pipeline.detected import Detected, best_objects
from pipeline.errors import UserError
from pipeline.figures import Picture, Points, draw_pixel_gradients, draw_sampling_points
from pipeline.machine_errors import naming
from pipeline.pixel_gradients import differentiable_outputs, gradient_norms
from pipeline.predict import Detector
from pipeline.sampling_points import Sampling, deformable_attention_of, sampling_recorded
from pipeline.visualize import draw_images


def look_inside(
    detector: Detector,
    shards: ShardSet,
    indices: Sequence[int],
    output: Path,
    objects: int = 3,
    threshold: float = 0.3,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """Saves pictures of the images at `indices` in the folder `output`, and returns their paths.

    `pixel_gradients_ID.png` (Figure 5) and `sampling_points_ID.png` (Figure 6, of encoder and
    decoder with deformable attention) show the at most `objects` best of an image,
    `predictions.png` all that score `threshold` or more beside the ground truth. `tell` hears of
    each file, and of what is left out. Raises `UserError` for a model without queries, and where
    no image has an object of such a score.
    """
    architecture = detector.config.model.architecture
    if architecture == "faster_rcnn":
        raise UserError(
            "visualize: got a checkpoint of faster_rcnn, expected a detector by queries, which are "
            "looked into; python -m pipeline predict CHECKPOINT IMAGES… draws what it finds"
        )
    attention = zip(("encoder", "decoder"), deformable_attention_of(detector.model), strict=True)
    lacking = [part for part, found in attention if found is None]
    if lacking:
        tell(
            f"no sampling points (Figure 6) of the {' and the '.join(lacking)}: {architecture} "
            "has no deformable attention there"
        )
    saved: list[Path] = []
    best = 0.0
    for index in indices:
        image_id = int(shards.image_id[index])
        drawn, here = _draw(detector, shards, index, objects, threshold)
        best = max(best, here)
        if not drawn:
            tell(f"image {image_id}: no object scores {threshold:g}, the best {here:.3f}")
        for name, figure in drawn.items():
            output.mkdir(exist_ok=True)
            saved.append(output / f"{name}_{image_id}.png")
            with naming(saved[-1]):
                figure.savefig(saved[-1], bbox_inches="tight", pad_inches=0.06)
            tell(f"saved {saved[-1]}")
    if not saved:
        raise UserError(
            f"--threshold: got {threshold:g}, expected less than the best score in these images "
            f"({len(indices)}), {best:.3f}; give a lower one, or other images"
        )
    saved.append(output / "predictions.png")
    draw_images(
        detector.model, shards, detector.labels, detector.config, detector.device,
        saved[-1], indices, threshold,
    )  # fmt: skip
    tell(f"saved {saved[-1]}")
    return saved


def _draw(
    detector: Detector, shards: ShardSet, index: int, most: int, threshold: float
) -> tuple[dict[str, Figure], float]:
    """The figures of an image by name, none where no object scores `threshold`; the best score."""
    picture, batch = load_image(detector, shards, index)
    images = batch.normalized_images().requires_grad_()
    with sampling_recorded(detector.model) as (encoder, decoder):
        outputs = differentiable_outputs(detector.model, images, batch.padding_mask)
    best = float(class_scores(outputs).detach().max())
    found = best_objects(outputs, threshold, most)
    if not found:
        return {}, best
    # A column without a category can score in a model that has learned little.
    names = [detector.labels.names[one.column] or f"class {one.column}" for one in found]
    norms = [gradient_norms(outputs, images, one.query, one.column) for one in found]
    gradients = torch.stack(norms).cpu().numpy()
    figures = {"pixel_gradients": draw_pixel_gradients(picture, found, names, gradients)}
    if encoder or decoder:
        tokens = [_points(call, _token_at(call, one)) for call in encoder[:1] for one in found]
        queries = [_points(call, one.query) for call in decoder for one in found]
        figures["sampling_points"] = draw_sampling_points(picture, found, names, tokens, queries)
    return figures, best


def choose_images(shards: ShardSet, image_ids: Sequence[int], count: int) -> list[int]:
    """Indices of the images with these ids; without any, of `count` images spread over the set.

    Raises `UserError` for an id that is not in the set."""
    if not image_ids:
        count = min(count, len(shards))
        return [i * len(shards) // count for i in range(count)]
    index_of = {image_id: index for index, image_id in enumerate(shards.image_id.tolist())}
    unknown = [image_id for image_id in image_ids if image_id not in index_of]
    if unknown:
        nearest = min(index_of, key=lambda known: abs(known - unknown[0]))
        raise UserError(
            f"--image-ids: got {unknown[0]}, expected ids of the {len(shards)} images of "
            f"{shards.folder}; the nearest is {nearest}"
        )
    return [index_of[image_id] for image_id in dict.fromkeys(image_ids)]


def load_image(detector: Detector, shards: ShardSet, index: int) -> tuple[Picture, Batch]:
    """The image as the model sees it, for drawing and as a batch of one."""
    sample = shards.read(index)
    example = decode(sample, detector.labels.column_of())
    example = resize_for_evaluation(example, detector.config.augment)
    picture = example.image.permute(1, 2, 0).numpy()
    return picture, collate([example], [sample.image]).to(detector.device)


def _token_at(encoder: Sampling, found: Detected) -> int:
    """The finest level's token that is nearest to the centre of the object."""
    height, width = encoder.shapes[0]
    centres = encoder.reference_points()[0, : height * width]
    x0, y0, x1, y1 = found.box
    centre = centres.new_tensor(((x0 + x1) / 2, (y0 + y1) / 2))
    return int((centres - centre).square().sum(-1).argmin())


def _points(sampling: Sampling, query: int) -> Points:
    return Points(
        sampling.reference_points()[0, query].cpu().numpy(),
        sampling.points()[0, query].flatten(0, -2).cpu().numpy(),
        sampling.weights[0, query].flatten().cpu().numpy(),
    )
