"""What is wrong, where, and which rule it breaks."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Check(StrEnum):
    """The rules that a sound folder keeps."""

    folder = "folder"
    """It exists and holds shards, all made with one tokenizer and one image tokenizer."""
    digest = "digest"
    """A tar is whole, and its closing digest is that of its bytes."""
    sidecar = "sidecar"
    """A tar has an index, made for it, that says what the tar holds."""
    layout = "layout"
    """Members follow each other without gaps, three a document."""
    tokenizer = "tokenizer"
    """The metadata names a tokenizer."""
    checksum = "checksum"
    """A document's bytes are those that were indexed."""
    json = "json"
    """A document's JSON can be read and agrees with its tokens."""
    ids = "ids"
    """Ids lie inside the vocabulary."""
    modality = "modality"
    """There is a modality for every token, the one that its id has."""
    pictures = "pictures"
    """Pictures open and close, have equal rows, and lie where JSON and index say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One broken rule: of a folder, of its ``shard``, or of the ``document`` with this number in
    the shard, the ``key`` of its members and, where its JSON can be read, its ``id``."""

    check: Check
    text: str
    folder: Path
    shard: str | None = None
    document: int | None = None
    key: str | None = None
    id: str | None = None

    def __str__(self) -> str:
        where = f"{self.folder}" if self.shard is None else f"{self.folder / self.shard}"
        if self.document is not None:
            names = [name for name in (self.key, self.id and f"id {self.id}") if name]
            where += f", document {self.document}"
            where += f" ({', '.join(names)})" if names else ""
        return f"{where}: {self.text}"

    def to_json(self) -> dict[str, Any]:
        """Flat and JSON-ready."""
        return {
            "folder": str(self.folder),
            "shard": self.shard,
            "document": self.document,
            "key": self.key,
            "id": self.id,
            "check": self.check.value,
            "problem": self.text,
        }
