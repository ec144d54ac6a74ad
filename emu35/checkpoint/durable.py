"""What a folder of a checkpoint or release holds: hashes, names, and paths that stay inside."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CHUNK_BYTES = 4 << 20


def file_sha256(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file, read in chunks; with ``sync`` its bytes are made durable as well.

    Reading a file to the end also pulls in what other hosts wrote on a shared filesystem, so the
    host that hashes a checkpoint sees (and syncs) everybody's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def files_below(folder: Path) -> list[str]:
    """Names of all files below ``folder``, relative, with forward slashes, sorted."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def folders_below(folder: Path) -> Iterator[Path]:
    """``folder`` and every folder below it, deepest first."""
    for name, _, _ in os.walk(folder, topdown=False):
        yield Path(name)


def is_inside(name: str) -> bool:
    """Whether ``name``, read from a file, is a plain relative path that cannot leave its folder."""
    if not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."
