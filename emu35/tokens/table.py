"""The Qwen byte-pair table: which file it is, where it lies, and that it is the right one.

The table is 2.5 MB and not ours to carry in the repository; ``scripts/fetch_tokenizer.py`` puts it
into the cache folder once. Its hash is checked on every load (10 ms): a table that differs in one
line would give ids the released weights do not understand, and nothing later would notice.
"""

import base64
import hashlib
import os
from pathlib import Path

from emu35.errors import TokenizerError
from emu35.files import write_atomically

TABLE_NAME = "qwen.tiktoken"
TABLE_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
REMEDY = "fetch it with: python scripts/fetch_tokenizer.py"


def cache_folder() -> Path:
    """``$EMU35_CACHE``, or ``~/.cache/emu35``."""
    chosen = os.environ.get("EMU35_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "emu35"


def table_path(configured: str | None = None) -> Path:
    """Where the table should be: the configured path, else its place in the cache folder."""
    return Path(configured).expanduser() if configured else cache_folder() / TABLE_NAME


def read_table(path: Path) -> bytes:
    """The table's bytes.

    Raises:
        TokenizerError: if the file is missing, unreadable, or not the released table.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"the text table {path} does not exist; {REMEDY}") from None
    except OSError as error:
        raise TokenizerError(
            f"the text table {path} cannot be read ({error.strerror}); {REMEDY}"
        ) from None
    check_table(content, origin=str(path))
    return content


def check_table(content: bytes, *, origin: str) -> None:
    """Raise TokenizerError unless ``content`` is the released table."""
    found = hashlib.sha256(content).hexdigest()
    if found != TABLE_SHA256:
        raise TokenizerError(
            f"{origin} is not the released text table: sha256 {found}, expected {TABLE_SHA256}; "
            f"remove it, then {REMEDY}"
        )


def parse_table(content: bytes) -> dict[bytes, int]:
    """Byte string -> id, from lines of base64 and rank."""
    ranks: dict[bytes, int] = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


def write_file(path: Path, *, content: bytes) -> None:
    """Write ``path`` whole or not at all: temporary name in the same folder, fsync, rename.

    Raises:
        OSError: as the file system gives it; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content=content)
