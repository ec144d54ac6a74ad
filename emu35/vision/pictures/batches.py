"""Global batches, decoded ahead by threads."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Pictures(Protocol):
    """Samples of a run by their number; threads share it."""

    def sample(self, sample: int) -> NDArray[np.uint8]:
        """``[3, H, W]``, a pure function of the number (from 0).

        Raises:
            DataError: too many pictures were rejected.
        """
        ...


class PictureBatches:
    """This rank's share of every global batch, the next one decoded in the background.

    Rank r of ``ranks`` takes the r-th equal part of the batch, so the global batch is the same
    whatever the number of ranks. At most the batch that is asked for and the next ``ahead`` ones
    are held, whatever ``threads`` decode them.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        global_batch_size: int,
        rank: int,
        ranks: int,
        micro_batch_size: int | None = None,
        threads: int = 1,
        ahead: int = 1,
    ) -> None:
        self._pictures = pictures
        self._batch = global_batch_size
        self._share = global_batch_size // ranks
        self._micro = micro_batch_size or self._share
        self._first = rank * self._share
        self._ahead = ahead
        self._workers = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="pictures")
        self._coming: dict[int, list[Future[NDArray[np.uint8]]]] = {}

    def step(self, step: int) -> NDArray[np.uint8]:
        """uint8 ``[global batch / ranks, 3, H, W]`` of training step ``step`` (from 1), for
        pictures of one size.

        Raises:
            DataError: too many pictures were rejected.
        """
        return np.stack(self._load(step))

    def micro_batches(self, step: int) -> list[NDArray[np.uint8]]:
        """The same in its order as micro-batches uint8 ``[micro-batch size, 3, H, W]``, each of one
        size.

        Raises:
            DataError: too many pictures were rejected.
        """
        pictures = self._load(step)
        firsts = range(0, len(pictures), self._micro)
        return [np.stack(pictures[first : first + self._micro]) for first in firsts]

    def close(self) -> None:
        """Let the threads finish what they are at, and end them."""
        self._forget(keep=range(0))
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> list[NDArray[np.uint8]]:
        wanted = range(step, step + self._ahead + 1)
        self._forget(keep=wanted)
        # The batch that is waited for comes first in the line of the threads.
        for number in wanted:
            if number not in self._coming:
                first = (number - 1) * self._batch + self._first
                self._coming[number] = [
                    self._workers.submit(self._pictures.sample, first + slot)
                    for slot in range(self._share)
                ]
        return [future.result() for future in self._coming.pop(step)]

    def _forget(self, *, keep: range) -> None:
        for number in [number for number in self._coming if number not in keep]:
            for future in self._coming.pop(number):
                future.cancel()
