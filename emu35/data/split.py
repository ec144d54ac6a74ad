"""Cutting documents that are longer than a row: never inside a picture, at parts where possible."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class PictureTooLong(ValueError):
    """A single picture exceeds the row; ``length`` is its token count."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length


def cut_points(*, length: int, spans: Ints, limit: int) -> list[int]:
    """Where to cut a document of ``length`` tokens so that every piece has at most ``limit``.

    A piece ends at the last part boundary in its second half; where there is none, inside the
    text at the limit itself. Returns the starts of all pieces, beginning with 0.

    Args:
        spans: [M, 2] pictures, ascending, as half-open token ranges.

    Raises:
        PictureTooLong: if a picture alone exceeds ``limit``.
    """
    starts = [0]
    boundaries = spans.reshape(-1)
    while length - starts[-1] > limit:
        begin = starts[-1]
        end = begin + limit
        row = int(np.searchsorted(spans[:, 0], end, side="left")) - 1
        if row >= 0 and end < spans[row, 1]:
            if spans[row, 0] <= begin:
                raise PictureTooLong(int(spans[row, 1] - spans[row, 0]))
            end = int(spans[row, 0])
        last = int(np.searchsorted(boundaries, end, side="right")) - 1
        if last >= 0 and boundaries[last] > begin + limit // 2:
            end = int(boundaries[last])
        starts.append(end)
    return starts
