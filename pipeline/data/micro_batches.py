"""How a global batch is cut into micro-batches, the images of one forward pass of one process.

Padding is what an image lacks to the largest height and width of its micro-batch. Sorting by shape
makes it small; a bound on the padded area makes the memory of a pass predictable. Which images
are in a global batch does not depend on any of this, and so neither does the gradient.
"""

import numpy as np


def cut(
    sizes: np.ndarray, rank: int, world: int, micro: int, by_shape: bool, most_pixels: int
) -> list[np.ndarray]:
    """Indices into the global batch of each micro-batch of `rank`, in order; as many on every rank,
    unless `world` does not divide G and all are of one image.

    sizes: [G, 2] (height, width) of the batch's images as they will be; G at least `world`.
    micro: most images in one. by_shape: images of like shape go together,
    else neighbours of the batch. most_pixels: no micro-batch has more than this of images x height
    x width, padding included; 0: no bound. Then their number may exceed G / world / micro.
    Raises `ValueError` where a single image exceeds it.
    """
    order = _by_shape(sizes) if by_shape else np.arange(len(sizes))
    parts = [order[i : i + micro] for i in range(0, len(order), micro)]
    if most_pixels:
        parts = _bounded(order, sizes, micro, most_pixels)
    if by_shape or most_pixels:
        parts = _multiple(parts, sizes, world)
        # The like-sized ones to different ranks at the same time: nobody waits for the largest.
        parts = sorted(parts, key=lambda part: padded_pixels(sizes[part]))
        return parts[rank::world]
    share = len(parts) // world
    return parts[rank * share : (rank + 1) * share]


def padded_pixels(sizes: np.ndarray) -> int:
    """Images x largest height x largest width."""
    return len(sizes) * int(sizes[:, 0].max()) * int(sizes[:, 1].max())


def _by_shape(sizes: np.ndarray) -> np.ndarray:
    """Portraits from the largest to the smallest, then landscapes from the smallest to the largest:
    where a micro-batch has of both, they are small."""
    landscape = sizes[:, 1] >= sizes[:, 0]
    area = sizes.prod(axis=1)
    return np.lexsort((np.where(landscape, area, -area), landscape))


def _bounded(
    order: np.ndarray, sizes: np.ndarray, micro: int, most_pixels: int
) -> list[np.ndarray]:
    """`order` cut wherever the next image would make the micro-batch too large."""
    parts: list[list[int]] = [[]]
    for index in order.tolist():
        if padded_pixels(sizes[[index]]) > most_pixels:
            height, width = sizes[index].tolist()
            raise ValueError(
                f"engine.max_padded_pixels: got {most_pixels}, expected {height * width} or more, "
                f"for an image of {height}x{width}"
            )
        together = [*parts[-1], index]
        if len(together) > micro or padded_pixels(sizes[together]) > most_pixels:
            parts.append([])
        parts[-1].append(index)
    return [np.array(part) for part in parts]


def _multiple(parts: list[np.ndarray], sizes: np.ndarray, world: int) -> list[np.ndarray]:
    """Halves the largest until their number is a multiple of `world`: ranks step together. Ends
    where all are single images."""
    while len(parts) % world:
        areas = [padded_pixels(sizes[part]) if len(part) > 1 else 0 for part in parts]
        i = int(np.argmax(areas))
        if not areas[i]:
            break
        half = len(parts[i]) // 2
        parts[i : i + 1] = [parts[i][:half], parts[i][half:]]
    return parts
