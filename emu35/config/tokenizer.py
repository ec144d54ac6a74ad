"""Which text tokenizer, and how many visual codes follow its ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from emu35.config.check import at_least


class TokenizerKind(StrEnum):
    """``emu35``: the released 151,643-entry table. ``bytes``: 256 byte tokens, needs no file."""

    emu35 = "emu35"
    bytes = "bytes"


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Text table and codebook size; together they fix every id (see emu35.tokens.vocabulary).

    ``table`` is the path of the Qwen tiktoken file; left empty, the cache folder is searched.
    ``vision`` is the folder of the image tokenizer that made the codes (config.yaml and model.ckpt,
    config.json and model.safetensors, or the codec.yaml of another package);
    generation decodes with it, a release contains a copy of it, and language models are trained
    only on shards that it encoded.
    """

    kind: TokenizerKind = TokenizerKind.bytes
    codebook_size: int = 1024
    table: str | None = None
    vision: str | None = None

    def problems(self) -> Iterator[str]:
        yield from at_least("tokenizer", 1, codebook_size=self.codebook_size)
