"""Tars of codes: what they say of themselves, and the cheap look that finds a damaged one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from emu35.data.ingest.shard_kind import ShardKind
from emu35.data.shards import BLOCK, read_tail, tail_digest
from emu35.errors import DataError

META_MEMBER = "__emu35__/codes.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesMeta:
    """What all codes of a tar share.

    Attributes:
        source: name of the source.
        tokenizer: digest of the image tokenizer (:func:`emu35.vision.codec.weights_digest`).
        dtype: what they were computed in.
        codebook_size: codes lie below it.
        factor: pixels per code along each side.
    """

    source: str
    tokenizer: str
    dtype: str
    codebook_size: int
    factor: int

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)


def check_codes_shard(shard: Path) -> None:
    """Look whether ``shard`` is there and whole: it has the size of a tar and ends as ours do.

    Raises:
        DataError: it is gone, or was cut short or replaced by something else.
    """
    try:
        with shard.open("rb") as file:
            tail = read_tail(file)
            size = file.seek(0, 2)
    except FileNotFoundError:
        # No cause: it is gone, and can be made again.
        raise DataError(f"{shard} is gone") from None
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error.strerror or error}; restore it") from error
    if size % BLOCK or tail_digest(tail) is None:
        raise DataError(f"{shard} is no complete tar of codes; it was cut short or replaced")


CODES_SHARDS = ShardKind(check=check_codes_shard, beside=lambda shard: ())
"""Tars of codes, each a file by itself."""
