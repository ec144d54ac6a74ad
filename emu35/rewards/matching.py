"""Pairing what was asked for with what was found."""

import numpy as np
from numpy.typing import NDArray

from emu35.rewards.optional import optional


def best_pairs(worth_WF: NDArray[np.floating] | NDArray[np.integer]) -> dict[int, int]:
    """Partners whose worth has the largest sum: row -> column, each at most once, as many as the
    shorter side has.

    Raises:
        ConfigError: scipy is not installed.
    """
    solver = optional("scipy.optimize", reward="ocr")
    rows, columns = solver.linear_sum_assignment(worth_WF, maximize=True)
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True)}
