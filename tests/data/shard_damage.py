"""Ways in which a shard goes bad, drawn by a seeded generator."""

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from emu35.data.index import index_path, read_index
from emu35.data.shards import BLOCK, TAIL

Damage = Callable[[Path, random.Random], None]
"""Harms the shard or its index; the random generator says where."""


def flip(path: Path, *, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def cut_tar(shard: Path, rng: random.Random) -> None:
    os.truncate(shard, rng.randrange(1, shard.stat().st_size))


def cut_index(shard: Path, rng: random.Random) -> None:
    os.truncate(index_path(shard), rng.randrange(1, index_path(shard).stat().st_size))


def grow_tar(shard: Path, rng: random.Random) -> None:
    with shard.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 512, 10_240])))


def empty_tar(shard: Path, _: random.Random) -> None:
    shard.write_bytes(b"")


def empty_index(shard: Path, _: random.Random) -> None:
    index_path(shard).write_bytes(b"")


def flip_index(shard: Path, rng: random.Random) -> None:
    path = index_path(shard)
    flip(path, offset=rng.randrange(path.stat().st_size), bit=rng.randrange(8))


def flip_tail(shard: Path, rng: random.Random) -> None:
    # Header and padding of the digest member, and its 64 characters.
    offset = shard.stat().st_size - TAIL + rng.randrange(BLOCK + 64)
    flip(shard, offset=offset, bit=rng.randrange(8))


def _another(path: Path, rng: random.Random) -> Path:
    """A file of the same kind with other bytes, small enough to be copied."""
    others = (other for other in path.parent.glob(f"*{path.suffix}") if other.is_file())
    small = [other for other in others if other != path and other.stat().st_size < 2**20]
    content = path.read_bytes()
    return rng.choice(sorted(other for other in small if other.read_bytes() != content))


def index_of_another(shard: Path, rng: random.Random) -> None:
    shutil.copyfile(_another(index_path(shard), rng), index_path(shard))


def tar_of_another(shard: Path, rng: random.Random) -> None:
    shutil.copyfile(_another(shard, rng), shard)


def lose_index(shard: Path, _: random.Random) -> None:
    index_path(shard).unlink()


def lose_tar(shard: Path, _: random.Random) -> None:
    shard.unlink()


def noise_tar(shard: Path, rng: random.Random) -> None:
    shard.write_bytes(rng.randbytes(shard.stat().st_size))


def noise_index(shard: Path, rng: random.Random) -> None:
    index_path(shard).write_bytes(rng.randbytes(rng.randrange(4000)))


def folder_for_tar(shard: Path, _: random.Random) -> None:
    shard.unlink()
    shard.mkdir()


def folder_for_index(shard: Path, _: random.Random) -> None:
    index_path(shard).unlink()
    index_path(shard).mkdir()


def link_to_nothing(shard: Path, rng: random.Random) -> None:
    path = rng.choice([shard, index_path(shard)])
    path.unlink()
    path.symlink_to(shard.parent / "gone")


def link_to_itself(shard: Path, rng: random.Random) -> None:
    path = rng.choice([shard, index_path(shard)])
    path.unlink()
    path.symlink_to(path)


def link_to_zeros(shard: Path, rng: random.Random) -> None:
    path = rng.choice([shard, index_path(shard)])
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(shard: Path, rng: random.Random) -> None:
    path = rng.choice([shard, index_path(shard)])
    path.unlink()
    os.mkfifo(path)


def huge_index(shard: Path, _: random.Random) -> None:
    os.truncate(index_path(shard), 2**42)  # a hole, not bytes


def sealed(shard: Path, body: bytes) -> None:
    """Write an index whose own checksum is right."""
    index_path(shard).write_bytes(body + hashlib.sha256(body).digest())


VERSION = 3
"""Of the index of a shard of documents."""


def with_header(shard: Path, change: Callable[[dict], object]) -> None:
    body = index_path(shard).read_bytes()[:-32]
    size = struct.unpack_from("<8sII", body)[2]
    header = json.loads(body[16 : 16 + size])
    text = json.dumps(change(header) or header).encode()
    text += b" " * (-len(text) % 8)
    sealed(shard, struct.pack("<8sII", body[:8], VERSION, len(text)) + text + body[16 + size :])


HEADERS: list[Callable[[dict], object]] = [
    lambda header: header["shapes"].update(length=[2**61]),
    lambda header: header["shapes"].update(spans=[2**32, 2**32]),
    lambda header: header["shapes"].update(modality=[-1, 4]),
    lambda header: header["shapes"].update(length=[10**400]),
    lambda header: header["shapes"].update(length="many"),
    lambda header: header["shapes"].update(length=3),
    lambda header: header["shapes"].update(span_row=[]),
    lambda header: header["shapes"].pop("checksum"),
    lambda header: header.update(tar_bytes=2**80),
    lambda header: header.update(tar_bytes="all"),
    lambda header: header.update(digest=None),
    lambda header: header.update(meta={"source": 3}),
    lambda header: header.update(meta=[]),
    lambda header: header["meta"].update(n_text="x"),
    lambda header: header["meta"].update(codebook_size=-5),
    lambda header: header.update(max_token=1e300),
    lambda header: [header],
    lambda header: 5,
]


def absurd_header(shard: Path, rng: random.Random) -> None:
    with_header(shard, rng.choice(HEADERS))


def absurd_json(shard: Path, rng: random.Random) -> None:
    text = rng.choice([b"[" * 200_000, b"\xff\xfe" * 8, b"{" * 8, b"NaN     ", b"9" * 50_000])
    sealed(shard, struct.pack("<8sII", b"EMU35IDX", VERSION, len(text)) + text)


def header_past_the_end(shard: Path, rng: random.Random) -> None:
    sealed(shard, struct.pack("<8sII", b"EMU35IDX", rng.choice([VERSION, 2**31]), 2**32 - 1))


def absurd_array(shard: Path, rng: random.Random) -> None:
    name = rng.choice(["token_word", "length", "run_word", "runs", "json_byte", "span_row"])
    body = bytearray(index_path(shard).read_bytes()[:-32])
    index = read_index(shard)
    place = body.index(getattr(index, name).tobytes())
    value = rng.choice([-1, 2**40, 2**62, -(2**63)])
    body[place : place + 8] = np.int64(value).tobytes()
    sealed(shard, bytes(body))


KINDS: list[Damage] = [
    cut_tar,
    cut_index,
    grow_tar,
    empty_tar,
    empty_index,
    flip_index,
    flip_tail,
    index_of_another,
    tar_of_another,
    lose_index,
    lose_tar,
    noise_tar,
    noise_index,
    folder_for_tar,
    folder_for_index,
    link_to_nothing,
    link_to_itself,
    link_to_zeros,
    pipe,
    huge_index,
    absurd_header,
    absurd_json,
    header_past_the_end,
    absurd_array,
]
