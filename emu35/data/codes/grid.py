"""A grid of codes as the bytes of a ``.npy`` file: uint32 [rows, columns], row after row.

Read by its exact header and a slice: a header is Python text otherwise, and may claim any size.
"""

import io
import re

import numpy as np
import numpy.typing as npt

EXTENSION = "codes.npy"
"""What members of tars that hold a grid end with."""

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '<u4', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9})\), \} *\n",
    re.DOTALL,
)

Grid = npt.NDArray[np.uint32]


def encode_grid(codes_HW: npt.NDArray[np.integer]) -> bytes:
    """The same codes give the same bytes."""
    buffer = io.BytesIO()
    array = np.ascontiguousarray(codes_HW, dtype="<u4")
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_grid(data: bytes) -> Grid:
    """Inverse of :func:`encode_grid`.

    Raises:
        ValueError: the bytes are no such file.
    """
    match = _HEADER.match(data)
    if match is None or int.from_bytes(match[1], "little") != match.end() - match.end(1):
        raise ValueError("no npy 1.0 file of uint32 [rows, columns]")
    rows, columns = int(match[2]), int(match[3])
    if rows * columns == 0 or rows * columns * 4 != len(data) - match.end():
        raise ValueError(f"{len(data)} bytes do not hold codes of shape {[rows, columns]}")
    return np.frombuffer(data, "<u4", offset=match.end()).reshape(rows, columns)
