"""The order of samples, a pure function of (shard sizes, seed, position).

Epochs follow each other in one endless stream of samples, each a permutation of all. Global batch b
is positions [b * G, (b + 1) * G) of the stream, so that every sample is seen once in every epoch,
none is left out and none is repeated to fill a batch; a batch may end one epoch and begin the
next. With it a resume at any step, on any number of processes, sees exactly the samples that
remain.
"""

from collections.abc import Sequence

import numpy as np


def random_stream(*key: int) -> np.random.Generator:
    """A random stream that depends on nothing but the key's non-negative integers."""
    # The length goes first because a SeedSequence takes trailing zeros for absent.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """[samples] int64: the sample at each position of the epoch.

    Shards are permuted, then samples within windows of `window` shards, so that few shards are
    read at a time. Every sample stands exactly once.
    """
    random = random_stream(seed, epoch)
    first = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
    shards = random.permutation(len(shard_sizes))
    order = []
    for start in range(0, len(shards), window):
        samples = [np.arange(first[s], first[s + 1]) for s in shards[start : start + window]]
        order.append(random.permutation(np.concatenate(samples)))
    return np.concatenate(order) if order else np.empty(0, dtype=np.int64)


def first_step(samples: int, batch_size: int, epoch: int) -> int:
    """The first global step of an epoch, counted from 0: all samples of the epochs before have
    been seen. The epoch ends before `first_step` of the next, in whole steps."""
    return -(-epoch * samples // batch_size)


class Stream:
    """Global batches by number; the orders of the last two epochs asked for are kept."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int) -> None:
        self.shard_sizes, self.seed, self.window = list(shard_sizes), seed, window
        self.samples = sum(self.shard_sizes)
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """[batch_size, 2] int64 (epoch, sample) of global batch `step`."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, within = np.divmod(positions, self.samples)
        samples = np.empty_like(within)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            samples[of_epoch] = self._order(int(epoch))[within[of_epoch]]
        return np.stack([epochs, samples], axis=1)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            last = {e: order for e, order in self._orders.items() if e == epoch - 1}
            order = epoch_order(self.shard_sizes, self.seed, epoch, self.window)
            self._orders = {**last, epoch: order}
        return self._orders[epoch]


def rank_slice(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """One rank's slice of a global batch; where `world` does not divide it, the first ranks have
    one more. Joined over ranks, slices give the batch, whatever the world size.
    """
    return np.array_split(batch, world)[rank]
