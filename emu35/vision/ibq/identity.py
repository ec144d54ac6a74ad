"""Which tokenizer a folder holds, whatever its layout: the digest that shards remember.

It is the SHA-256 of the weights file. Converted to another layout the same weights are another
file, so what converts notes beside it the digest of the folder that they come from, and the SHA-256
of the file that it says so of: said of other bytes, it says nothing.
"""

import hashlib
from pathlib import Path
from typing import Any, cast


def file_digest(path: Path) -> str:
    """SHA-256 of a file. Raises: OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_of(own: str, *, digest: str | None) -> dict[str, str]:
    """What to write beside a weights file of SHA-256 ``own`` that came from a folder of ``digest``
    (None: from nowhere)."""
    return {"sha256": own, "digest": digest or own}


def noted_digest(note: object, *, own: str) -> str:
    """The digest that ``note`` tells of a weights file of SHA-256 ``own``, else that one."""
    if isinstance(note, dict):
        entry = cast(dict[str, Any], note)
        if entry.get("sha256") == own and isinstance(entry.get("digest"), str):
            return entry["digest"]
    return own
