"""Weights as safetensors, sharded with an index, in the layout that every reader of them expects.

``model.safetensors`` where everything fits one file, else ``model-00001-of-00003.safetensors`` and
so on; ``model.safetensors.index.json`` is written in both cases and last, so a folder with an index
has all its shards. The same tensors give the same bytes, on every machine.

The format holds no code. What a hostile or damaged file could still do is name a path outside its
folder, list tensors that are not there, or lie about sizes: all three are checked here or by the
safetensors library (offsets must tile the file exactly).
"""

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emu35.checkpoint.safetensor_index import INDEX, SINGLE, read_weight_map
from emu35.errors import ReleaseError
from emu35.files import replacing, write_atomically

SHARD_BYTES = 5_000_000_000
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_METADATA = {"format": "pt"}  # readers refuse files that do not say so


@dataclass(kw_only=True, slots=True, frozen=True)
class TensorInfo:
    """Where a stored tensor lies and what it is, known without reading it."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_safetensors(
    tensors: Mapping[str, torch.Tensor],
    *,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write ``tensors`` (converted to ``dtype``) into ``folder``; the names of the files written.

    Shards are filled in the order of ``tensors``; one tensor never spans two, so a tensor larger
    than ``max_shard_bytes`` gets a file to itself. Only one shard is copied at a time.

    Raises:
        ReleaseError: the disk is full or the folder cannot be written; no file is left half done.
    """
    sizes = {
        name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()
    }
    shards = _plan(sizes, max_shard_bytes=max_shard_bytes)
    names = [_shard_name(index, count=len(shards)) for index in range(len(shards))]
    try:
        for name, members in zip(names, shards, strict=True):
            # Copied, because slices of one matrix share storage, which the format cannot express.
            part = {
                member: tensors[member].detach().to("cpu", dtype, copy=True).contiguous()
                for member in members
            }
            _write_shard(part, path=folder / name)
        weight_map = {
            member: name for name, members in zip(names, shards, strict=True) for member in members
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("ascii")
        write_atomically(folder / INDEX, content=content)
    except (OSError, SafetensorError) as error:
        raise ReleaseError(
            f"cannot write weights into {folder}: {error}; they need {sum(sizes.values()):,} bytes"
        ) from error
    return [*names, INDEX]


class SafetensorFolder(Mapping[str, torch.Tensor]):
    """The tensors of a folder of safetensors, each read when it is asked for.

    Raises:
        ReleaseError: no weights there, an index that disagrees with its shards, a path that leaves
            the folder, a damaged or truncated file, or a type other than fp32, bf16, fp16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: dict[str, TensorInfo] = {}
        weight_map = read_weight_map(folder) or dict.fromkeys(self._scan(SINGLE), SINGLE)
        for file in dict.fromkeys(weight_map.values()):
            self.info.update(self._scan(file))
        _check_index(weight_map, info=self.info, folder=folder)
        # The order of a release, whichever way the shards sort their tensors.
        self.info = {name: self.info[name] for name in sorted(self.info, key=_natural)}

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.info[name]
        try:
            with self._open(info.file) as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ReleaseError(f"{self.folder / info.file}: {name}: {error}") from error

    def part(self, name: str, *, dim: int, start: int, stop: int) -> torch.Tensor:
        """Indices [start, stop) of dimension ``dim`` (0 or 1) of a tensor; the rest of it is not
        read."""
        info = self.info[name]
        whole: list[slice] = [slice(None)] * len(info.shape)
        whole[dim] = slice(start, stop)
        try:
            with self._open(info.file) as file:
                return file.get_slice(name)[tuple(whole)]
        except (OSError, SafetensorError) as error:
            raise ReleaseError(f"{self.folder / info.file}: {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.info[name].shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: info.shape for name, info in self.info.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The one type of all tensors.

        Raises:
            ReleaseError: the tensors have several types.
        """
        dtypes = {info.dtype for info in self.info.values()}
        if len(dtypes) != 1:
            raise ReleaseError(
                f"{self.folder} mixes the types {sorted(map(str, dtypes))}; convert it to one"
            )
        return dtypes.pop()

    def _open(self, file: str) -> Any:
        return safe_open(str(self.folder / file), framework="pt", device="cpu")

    def _scan(self, file: str) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        path = self.folder / file
        try:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise ReleaseError(
                            f"{path}: {name} has type {part.get_dtype()}; "
                            f"only {', '.join(DTYPES)} are read"
                        )
                    shape = tuple(part.get_shape())
                    found[name] = TensorInfo(file=file, dtype=dtype, shape=shape)
        except FileNotFoundError:
            raise ReleaseError(f"{path} is missing, although {INDEX} names it") from None
        except (OSError, SafetensorError) as error:
            raise ReleaseError(f"{path} is damaged or truncated: {error}") from error
        return found


def _plan(sizes: Mapping[str, int], *, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(index: int, *, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(part: dict[str, torch.Tensor], *, path: Path) -> None:
    with replacing(path) as temporary:
        # The library makes files that only their owner can read; ours are made as any other.
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(part, temporary, metadata=_METADATA)
        temporary.chmod(mode)


def _check_index(
    weight_map: Mapping[str, str], *, info: Mapping[str, TensorInfo], folder: Path
) -> None:
    for name, file in weight_map.items():
        if name not in info or info[name].file != file:
            raise ReleaseError(f"{folder / file} lacks the tensor {name} that {INDEX} says it has")
    if unlisted := sorted(info.keys() - weight_map.keys()):
        raise ReleaseError(f"{folder}: {unlisted[0]} is in a shard but not in {INDEX}")


def _natural(name: str) -> list[str]:
    """Sort key that puts layer 2 before layer 10."""
    return [f"{int(part):09d}" if part.isdigit() else part for part in name.split(".")]
