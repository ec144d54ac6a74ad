"""What the books of an output folder have to know about its shards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu35.data.index import index_path, read_index


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardKind:
    """A kind of shard.

    Attributes:
        check: the cheap look at a shard; raises DataError where it is gone or damaged.
        beside: files that come and go with it.
    """

    check: Callable[[Path], object]
    beside: Callable[[Path], Sequence[Path]]


TOKEN_SHARDS = ShardKind(check=read_index, beside=lambda shard: (index_path(shard),))
"""Documents as tokens, each tar with its index."""
