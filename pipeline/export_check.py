"""Whether an exported file detects what the model in this repository does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.boxes import cxcywh_to_xyxy
from model.postprocess import class_scores
from model.precision import full_precision
from pipeline.data.batch import Batch
from pipeline.errors import UserError
from pipeline.export_graph import TOP, smallest_side
from pipeline.predict import Detector

TOLERANCE = 1e-4
"""Of scores, and of boxes in shares of the image."""

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""The exported `PixelsToDetections`."""


@dataclass(frozen=True)
class Difference:
    """The largest under one shape of the input [N, 3, H, W]."""

    shape: tuple[int, int, int]
    """(N, H, W)."""
    scores: float
    boxes: float

    def __str__(self) -> str:
        batch, height, width = self.shape
        return (
            f"batch {batch}, {height}x{width}: largest difference of scores {self.scores:.1e}, "
            f"of boxes {self.boxes:.1e}"
        )


def check(detector: Detector, run: Run, say: Callable[[str], None]) -> list[Difference]:
    """Compares at three shapes, with padding, and tells each result to `say`.

    Raises `UserError` where a difference is beyond `TOLERANCE`.
    """
    found = []
    for index, shape in enumerate(_shapes(detector)):
        images, sizes = _pictures(shape, seed=index)
        difference = Difference(shape, *_compare(detector, images, sizes, run(images, sizes)))
        say(str(difference))
        if not max(difference.scores, difference.boxes) <= TOLERANCE:
            raise UserError(
                f"the exported file does not agree with the checkpoint ({difference}; expected at "
                f"most {TOLERANCE:g}); nothing was written"
            )
        found.append(difference)
    return found


def _shapes(detector: Detector) -> list[tuple[int, int, int]]:
    """(N, H, W): of an image as evaluation resizes it, of two smaller ones, of the smallest."""
    augment = detector.config.augment
    least = smallest_side(detector.config.model)
    short = max(augment.val_short_side or 320, least)
    return [
        (1, short, max(short, min(short * 4 // 3, augment.max_side))),
        (2, max(short * 3 // 4, least), short + 1),
        (3, least, least + 7),
    ]


def _pictures(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Blots and noise, every image but the first a little smaller than the batch."""
    batch, height, width = shape
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 9, 9, generator=random)
    blots = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(batch, 3, height, width, generator=random)
    images = (255 * (0.8 * blots + 0.2 * noise)).to(torch.uint8)
    cut = torch.arange(batch)[:, None] * torch.tensor([height // 8, width // 5])
    return images, torch.tensor([height, width]) - cut


def _compare(
    detector: Detector, images: Tensor, sizes: Tensor, found: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """The largest differences of scores and boxes.

    The order of pairs with the same score may differ. So each detection is compared with the query
    of the model that is nearest to it, and the scores by their ranks.
    """
    batch, _, height, width = images.shape
    padding = torch.ones(batch, height, width, dtype=torch.bool)
    for mask, (own_height, own_width) in zip(padding, sizes.tolist(), strict=True):
        mask[:own_height, :own_width] = False
    inputs = Batch(images, padding, [], [], sizes)
    with torch.no_grad():
        outputs = detector.model(inputs.normalized_images(), padding)
    expected = class_scores(outputs)  # [N, Q, classes]
    boxes = cxcywh_to_xyxy(full_precision(outputs["pred_boxes"]))
    softmax = outputs.get("classification") == "softmax"
    ranked = (expected.amax(-1) if softmax else expected.flatten(1)).sort(descending=True).values
    ranked = ranked[:, :TOP]
    if found[0].shape != ranked.shape:
        got, wanted = list(found[0].shape), list(ranked.shape)
        raise UserError(f"the exported file gives scores {got}, expected {wanted}")
    worst = [(found[0] - ranked).abs().max(), torch.zeros(())]
    for scores, labels, places, all_scores, all_boxes in zip(*found, expected, boxes, strict=True):
        by_score = (all_scores[:, labels] - scores).abs()  # [Q, P]
        by_box = (all_boxes[:, None] - places).abs().amax(-1)
        nearest = torch.maximum(by_score, by_box).argmin(0, keepdim=True)
        for index, distance in enumerate((by_score, by_box)):
            worst[index] = torch.maximum(worst[index], distance.gather(0, nearest).max())
    return worst[0].item(), worst[1].item()
