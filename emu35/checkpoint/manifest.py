"""``manifest.json``: what a checkpoint consists of, and whether it still does.

The file is JSON in one canonical form (sorted keys, one space of indentation) and carries the hash
of its own other contents, so a flipped bit anywhere in it is noticed, and noticed as damage rather
than mistaken for another configuration.
"""

import hashlib
import json
import platform
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from emu35 import __version__
from emu35.checkpoint.durable import file_sha256, is_inside
from emu35.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(kw_only=True, slots=True, frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    ``identity`` is the configuration that decides whether a run may continue from here, ``extra``
    whatever the trainer wants back (small and JSON-able).
    """

    step: int
    files: dict[str, FileEntry]
    identity: dict[str, Any]
    extra: dict[str, Any]
    versions: dict[str, str]

    @property
    def total_size(self) -> int:
        """Bytes of all files, the manifest itself not counted."""
        return sum(entry.size for entry in self.files.values())


class DamagedError(Exception):
    """A checkpoint cannot be used; the text says why. Internal: never reaches a user as such."""


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as JSON returns it: string keys, lists for tuples."""
    return json.loads(json.dumps(value))


def identity_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``identity``."""
    return hashlib.sha256(_render(plain(identity))).hexdigest()


def current_versions() -> dict[str, str]:
    """Versions of everything that decides the bytes of a checkpoint, without importing any."""
    found = {"emu35": __version__, "python": platform.python_version()}
    for name in ("torch", "megatron-core", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def write_manifest(manifest: Manifest, *, folder: Path) -> None:
    """Write ``folder/manifest.json`` durably."""
    body = plain(asdict(manifest))
    body["format"] = FORMAT
    body["identity_sha256"] = identity_hash(manifest.identity)
    body["manifest_sha256"] = hashlib.sha256(_render(body)).hexdigest()
    write_atomically(folder / MANIFEST, content=_render(body))


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder/manifest.json``, without looking at the files it lists.

    Raises:
        DamagedError: missing, unreadable, changed since it was written, of a format this version
            does not know, or naming a path outside the folder.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    try:
        body = json.loads(content)
    except ValueError:
        raise DamagedError(f"{MANIFEST} is not JSON (damaged or truncated)") from None
    if not isinstance(body, dict) or _render(body) != content:
        raise DamagedError(f"{MANIFEST} was changed after it was written")
    claimed = body.pop("manifest_sha256", None)
    if claimed != hashlib.sha256(_render(body)).hexdigest():
        raise DamagedError(f"{MANIFEST} was changed after it was written")
    if body.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} has format {body.get('format')}, not {FORMAT}")
    try:
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        manifest = Manifest(
            step=int(body["step"]),
            files=files,
            identity=body["identity"],
            extra=body["extra"],
            versions=body["versions"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} lacks a field: {error}") from error
    for name in files:
        if not is_inside(name):
            raise DamagedError(f"{MANIFEST} names {name!r}, which is not a path inside the folder")
    return manifest


def describe_file(folder: Path, *, name: str) -> FileEntry:
    """Size and hash of a file just written, made durable on the way.

    Raises:
        OSError: it cannot be read or synced.
    """
    path = folder / name
    return FileEntry(size=path.stat().st_size, sha256=file_sha256(path, sync=True))


def check_file(folder: Path, *, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a listed file, or None. The cheap checks come before the hash."""
    path = folder / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a regular file"
        if status.st_size != entry.size:
            return f"{name} has {status.st_size} bytes instead of {entry.size}"
        if file_sha256(path) != entry.sha256:
            return f"{name} has another SHA-256 than when it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """``key: value there, value here`` for each leaf in which two nested mappings differ."""
    mine, other = dict(_leaves(plain(ours))), dict(_leaves(plain(theirs)))
    for key in sorted(mine.keys() | other.keys()):
        here, there = mine.get(key, "absent"), other.get(key, "absent")
        if here != there:
            yield f"{key}: {there!r} in the checkpoint, {here!r} here"


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _render(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")
