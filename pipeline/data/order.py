"""The order of an epoch, a pure function of (shard sizes, seed, epoch).

With it a resume at any step, on any number of processes, sees exactly the samples that remain.
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


def rank_slice(order: np.ndarray, step: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """The samples of one rank in global batch `step`: its slice of [step*G, (step+1)*G).

    `batch_size` is the global G, a multiple of `world`. Joined over ranks, slices give the batch,
    whatever the world size.
    """
    assert batch_size % world == 0, f"global batch {batch_size} over {world} processes"
    share = batch_size // world
    start = step * batch_size + rank * share
    return order[start : start + share]
