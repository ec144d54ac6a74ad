"""The shuffled order of one source: a pure function of (seed, source name, epoch, position).

Shards are permuted, laid end to end, and the items of each window of ``window`` positions are
permuted among themselves. Every item therefore comes once an epoch, reads stay near each other in
the files, and any position can be reached without replaying the ones before it.

Permutations sort the raw output of Philox, whose stream numpy guarantees. ``Generator.permutation``
may change between numpy versions, which would silently reorder a run resumed after an upgrade.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def permutation(size: int, *, key: str) -> Ints:
    """A permutation of ``range(size)`` that depends on nothing but ``size`` and ``key``."""
    digest = hashlib.sha256(key.encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.argsort(bits.random_raw(size), kind="stable").astype(np.int64)


class SourceOrder:
    """Maps (epoch, window number) to item numbers.

    Args:
        items_per_shard: [shards] item counts; items are numbered shard after shard.
        window: how many consecutive positions are shuffled together.
    """

    def __init__(self, *, items_per_shard: Ints, window: int, seed: int, name: str) -> None:
        self.size = int(items_per_shard.sum())
        self.window = window
        self._counts = items_per_shard
        self._starts = np.cumsum(items_per_shard) - items_per_shard
        self._key = f"{seed}/{name}"
        self._epoch = -1
        self._shards: Ints = np.zeros(0, np.int64)
        self._ends: Ints = np.zeros(0, np.int64)

    def items(self, *, epoch: int, window: int) -> Ints:
        """Item numbers of one window, [<= window]; empty past the end of the epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards = permutation(len(self._counts), key=f"{self._key}/{epoch}/shards")
            self._ends = np.cumsum(self._counts[self._shards])
        begin = window * self.window
        end = min(begin + self.window, self.size)
        if begin >= end:
            return np.zeros(0, np.int64)
        positions = np.arange(begin, end)
        place = np.searchsorted(self._ends, positions, side="right")
        shard = self._shards[place]
        items = positions - (self._ends[place] - self._counts[shard]) + self._starts[shard]
        return items[permutation(end - begin, key=f"{self._key}/{epoch}/{window}")]
