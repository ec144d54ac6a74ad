"""Text to ids and back: the released byte-pair encoding, or plain bytes.

Both kinds read text the same way: NFC first, then lone surrogates (which no UTF-8 text contains,
but JSON and file names may) become U+FFFD. So ``decode(encode(x))`` is the NFC form of ``x``.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Protocol

import tiktoken

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.tokens.table import parse_table, read_table, table_path
from emu35.tokens.vocabulary import SPECIAL_PATTERN, Vocabulary, vocabulary_of

SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How Qwen cuts text into words before merging bytes; every digit is a word of its own."""

# The regular-expression engine inside tiktoken aborts on a run of about a million blanks. The
# official tokenizer dies there, so any cut is as good as another; shorter runs stay whole.
_LONGEST_BLANK = 900_000
_BLANK = re.compile(r"\s+")


class TextTokenizer(Protocol):
    """What every kind of text tokenizer offers."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids this tokenizer speaks, specials and visual codes included."""
        ...

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is added.

        By default special strings are ordinary characters and the result holds text ids only.
        With ``allow_special`` they are parsed, as the official tokenizer does. Never raises.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, specials as their strings, broken UTF-8 as U+FFFD.

        Raises:
            TokenizerError: if an id lies outside the vocabulary.
        """
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of ``ids`` as it stands, specials as their strings: ``decode`` before broken
        sequences become U+FFFD. A character may be split over tokens; bytes can be joined.

        Raises:
            TokenizerError: if an id lies outside the vocabulary.
        """
        ...


class BytePairTokenizer:
    """The Qwen table of the release (ids equal to the official tokenizer's)."""

    def __init__(self, *, table: Path, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._table = table
        self._encoding, self._words = _load_encoding(table)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes read the table themselves: smaller and faster than sending it.
        return _rebuild, (self._table, self.vocabulary)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        text = _readable(text)
        if not allow_special:
            return self._encode_text(text)
        ids: list[int] = []
        for piece in _split_special(text, vocabulary=self.vocabulary):
            ids.extend([piece] if isinstance(piece, int) else self._encode_text(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return _join(ids, words=self._words, vocabulary=self.vocabulary)

    def _encode_text(self, text: str) -> list[int]:
        if len(text) <= _LONGEST_BLANK:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for blank in _BLANK.finditer(text):
            for cut in range(blank.start() + _LONGEST_BLANK, blank.end(), _LONGEST_BLANK):
                ids.extend(self._encoding.encode_ordinary(text[start:cut]))
                start = cut
        return ids + self._encoding.encode_ordinary(text[start:])


class ByteTokenizer:
    """One id per UTF-8 byte: needs no file, for tests and small models."""

    def __init__(self, *, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        text = _readable(text)
        if not allow_special:
            return list(text.encode())
        ids: list[int] = []
        for piece in _split_special(text, vocabulary=self.vocabulary):
            ids.extend([piece] if isinstance(piece, int) else piece.encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return _join(ids, words=_BYTES, vocabulary=self.vocabulary)


def build_text_tokenizer(config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer a configuration section describes.

    Raises:
        TokenizerError: if the table of kind ``emu35`` is missing or differs; the message names
            the script that fetches it.
    """
    vocabulary = vocabulary_of(config)
    if config.kind is TokenizerKind.bytes:
        return ByteTokenizer(vocabulary=vocabulary)
    return BytePairTokenizer(table=table_path(config.table), vocabulary=vocabulary)


_BYTES = [bytes([value]) for value in range(256)]


@cache
def _load_encoding(table: Path) -> tuple[tiktoken.Encoding, list[bytes]]:
    ranks = parse_table(read_table(table))
    encoding = tiktoken.Encoding(
        "emu35", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return encoding, sorted(ranks, key=ranks.__getitem__)


def _rebuild(table: Path, vocabulary: Vocabulary) -> BytePairTokenizer:
    return BytePairTokenizer(table=table, vocabulary=vocabulary)


def _readable(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    try:
        text.encode()
    except UnicodeEncodeError:
        # What tiktoken does: pairs of surrogates are joined, lone ones replaced.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _split_special(text: str, *, vocabulary: Vocabulary) -> Iterator[str | int]:
    """Text between special strings as str, special strings as ids, in order."""
    start = 0
    for match in SPECIAL_PATTERN.finditer(text):
        id = vocabulary.special_id(match[0])
        if id is None:
            continue
        if match.start() > start:
            yield text[start : match.start()]
        yield id
        start = match.end()
    if start < len(text):
        yield text[start:]


def _join(ids: Iterable[int], *, words: list[bytes], vocabulary: Vocabulary) -> bytes:
    pieces: list[bytes] = []
    n_text = vocabulary.n_text
    for id in ids:
        if 0 <= id < n_text:
            pieces.append(words[id])
        else:
            vocabulary.check(id)
            pieces.append(vocabulary.special_string(id).encode())
    return b"".join(pieces)
