"""The tables of docs/data.md on order and padding: `python tests/pipeline/measure_order.py`.

At COCO's size, by the functions that training uses. Sizes of images are a mix like COCO's, of which
the manifest of real data would give the true one.
"""

import sys
from math import comb
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config import AugmentConfig
from pipeline.data.augment import choose
from pipeline.data.micro_batches import cut, padded_pixels
from pipeline.data.order import epoch_order, random_stream

IMAGES, PER_SHARD, BATCH = 118_287, 1000, 32
MIX = {(480, 640): 0.40, (427, 640): 0.27, (640, 480): 0.14, (640, 427): 0.10, (375, 500): 0.05,
       (640, 640): 0.04}  # fmt: skip


def order() -> None:
    shards = [min(PER_SHARD, IMAGES - start) for start in range(0, IMAGES, PER_SHARD)]
    shard_of = np.repeat(np.arange(len(shards)), shards)
    pairs = comb(BATCH, 2)
    print(f"{IMAGES} images, {len(shards)} shards, batches of {BATCH}: of {pairs} pairs in a batch")
    print("window  neighbours apart: 5% below, median  same-shard pairs: mean, 99%  shards read")
    for window in (1, 4, 8, 16, len(shards)):
        apart, same, read = [], [], []
        for epoch in range(3):
            found = epoch_order(shards, 0, epoch, window)
            position = np.argsort(found)
            within = shard_of[1:] == shard_of[:-1]
            apart.append(np.abs(np.diff(position))[within])
            batches = shard_of[found[: IMAGES // BATCH * BATCH]].reshape(-1, BATCH)
            counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
            same += [int((c * (c - 1) // 2).sum()) for c in counts]
            read += [len(c) for c in counts]
        gaps = np.concatenate(apart)
        print(
            f"{window:>6}  {np.percentile(gaps, 5):>10.0f} {np.median(gaps):>10.0f}"
            f"  {np.mean(same):>10.1f} {np.percentile(same, 99):>6.0f}  {np.mean(read):>6.1f}"
        )


def padding() -> None:
    random = random_stream(0)
    sizes = list(MIX)
    print("micro-batch  by shape  bound Mpx  padding  largest Mpx: 99%, most  passes")
    for micro in (2, 4, 8):
        for by_shape, most in ((False, 0), (True, 0), (True, micro * 1_000_000)):
            areas, used, passes = [], 0, 0
            for batch in range(500):
                chosen = random_stream(1, batch).choice(len(sizes), BATCH, p=list(MIX.values()))
                of_batch = np.array(
                    [choose(sizes[i], AugmentConfig(), random).size for i in chosen]
                )
                parts = cut(of_batch, 0, 1, micro, by_shape, most)
                areas += [padded_pixels(of_batch[part]) for part in parts]
                used += int(of_batch.prod(axis=1).sum())
                passes += len(parts)
            print(
                f"{micro:>11}  {by_shape!s:>8}  {most / 1e6:>9.1f}  {1 - used / sum(areas):>7.1%}"
                f"  {np.percentile(areas, 99) / 1e6:>16.2f} {max(areas) / 1e6:>6.2f}"
                f"  {passes / 500:>6.1f}"
            )


if __name__ == "__main__":
    order()
    padding()
