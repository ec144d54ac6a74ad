"""Grids of codes as ``.npy`` bytes, from friend and foe."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from emu35.data.codes.grid import decode_grid, encode_grid

GRIDS = arrays.arrays(np.uint32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9))


@given(grid=GRIDS)
def test_a_grid_comes_back_and_numpy_reads_it_too(grid: npt.NDArray[np.uint32]) -> None:
    data = encode_grid(grid)
    np.testing.assert_array_equal(decode_grid(data), grid)
    theirs = np.load(io.BytesIO(data), allow_pickle=False)
    assert theirs.dtype == np.uint32
    np.testing.assert_array_equal(theirs, grid)
    assert encode_grid(np.asfortranarray(grid.astype(np.int64))) == data


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), ">u4"),
        np.zeros((2, 2, 2), np.uint32),
        np.zeros((0, 2), np.uint32),
        np.asfortranarray(np.arange(6, dtype=np.uint32).reshape(2, 3)),
        np.array([[None]], dtype=object),
    ],
    ids=["int64", "big endian", "3-d", "empty", "by column", "pickled"],
)
def test_other_arrays_are_refused(array: npt.NDArray[np.generic]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(ValueError, match=r"no npy 1\.0 file|do not hold"):
        decode_grid(buffer.getvalue())


def test_a_grid_that_claims_more_than_there_is_is_refused() -> None:
    data = encode_grid(np.zeros((2, 3), np.uint32))
    huge = data.replace(b"(2, 3), }" + b" " * 12, b"(2000000, 3000000), }")
    assert huge != data
    for damaged in (data[:-1], data + b"x", huge):
        with pytest.raises(ValueError, match="do not hold codes of shape"):
            decode_grid(damaged)


@given(at=st.integers(0, 151), value=st.integers(0, 255), end=st.integers(0, 152))
def test_whatever_the_bytes_are_the_error_is_one(at: int, value: int, end: int) -> None:
    data = bytearray(encode_grid(np.zeros((2, 3), np.uint32)))
    data[at] = value
    for damaged in (bytes(data), bytes(data[:end])):
        try:
            assert decode_grid(damaged).ndim == 2
        except ValueError:
            continue
