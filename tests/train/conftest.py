"""Ranks that the tests of one module share."""

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """Pools of one, two and four ranks; each starts when it is first asked."""
    with RankPool(1) as one, RankPool(2) as two, RankPool(4) as four:
        yield {1: one, 2: two, 4: four}
