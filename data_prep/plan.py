"""Which sample goes into which shard, in which order: decided before anything is written.

The plan follows from the annotation file, the sizes of the image files and the options alone. So
any number of processes or machines writes the same bytes, and a finished shard stays valid.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.coco import CocoFile
from data_prep.shards import END, member_length
from data_prep.storage import Facts, Folder, absolute
from data_prep.write import Item, Task


@dataclass(frozen=True)
class Limits:
    """A shard ends at either of them, whichever comes first."""

    bytes: int
    samples: int


def plan_shards(
    coco: CocoFile, sizes: Sequence[int | None], limits: Limits, seed: int
) -> list[list[int]]:
    """Positions in `coco.images` of the samples of each shard, in order.

    Files sorted by class or video would otherwise be neighbours in a shard, and training
    shuffles within a few shards only. Ordering by a hash needs no generator's stability.

    Args:
        coco: the annotation file.
        sizes: bytes of each image's file; images without one are left out.
        limits: of a shard.
        seed: of the order.
    """

    def rank(image: int) -> bytes:
        return hashlib.sha256(f"{seed}:{coco.images[image].id}".encode()).digest()

    present = np.array([-1 if size is None else size for size in sizes])
    lengths = (member_length(present) + member_length(coco.sample_lengths())).tolist()
    shards: list[list[int]] = []
    filled = 0
    for image in sorted(np.flatnonzero(present >= 0).tolist(), key=rank):
        length = lengths[image]
        if not shards or filled + length > limits.bytes or len(shards[-1]) == limits.samples:
            shards.append([])
            filled = len(END)
        shards[-1].append(image)
        filled += length
    return shards


def shard_tasks(
    coco: CocoFile,
    facts: Sequence[Facts | None],
    plan: Sequence[Sequence[int]],
    images: Folder,
    output: Folder,
    categories: frozenset[int],
    decode: bool,
) -> Iterator[Task]:
    """What to write for each shard; made one at a time, for it holds all records of a shard."""
    images, output = absolute(images), absolute(output)  # Ray's workers run where Ray was started
    for number, members in enumerate(plan):
        items = []
        for image in members:
            record, file = coco.images[image], facts[image]
            assert file is not None
            items.append(
                Item(
                    record.id,
                    record.file_name,
                    file,
                    record.width,
                    record.height,
                    coco.sample_json(image),
                    coco.annotation_count(image),
                    coco.is_suspect(image),
                )
            )
        yield Task(f"shard-{number:06d}", output, images, categories, items, decode)
