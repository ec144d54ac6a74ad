"""A checkpoint's state into another, tensor by tensor, without the ranks that wrote it.

The files are independent of the layout already (:mod:`emu35.checkpoint.optimizer_state`), so what
is decided here is what they hold: with or without the optimizer, and of which type the parameters
are. bf16 parameters come with fp32 masters, which are the truth: fp32 parameters are made of them,
and become them the other way round, so that nothing is rounded twice.

Pieces are read and written one after the other, large ones divided, so the largest piece of the
source is all the memory that is needed.
"""

import io
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from emu35.checkpoint.optimizer_state import MASTER, MOMENTS, PREFIX
from emu35.checkpoint.unpickle import METADATA, refuse_code
from emu35.errors import CheckpointError

CHUNK_BYTES = 256 << 20
"""Larger pieces are divided: a rank reads whole pieces, however little of one it needs."""
FILE_BYTES = 4 << 30
_OPTIMIZER = f"{PREFIX}."
_MASTER = f"{PREFIX}.{MASTER}."


@dataclass(kw_only=True, slots=True, frozen=True)
class _Tensor:
    """One tensor to write: a tensor of the source, perhaps under another name and of another type
    (None: its own)."""

    name: str
    origin: str
    dtype: torch.dtype | None


class StateFiles:
    """The tensors in a folder that :mod:`emu35.checkpoint.sharded` wrote, piece by piece.

    Raises:
        CheckpointError: the folder holds no state, or one that would run code.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / METADATA).is_file():
            raise CheckpointError(f"{folder} holds no sharded state ({METADATA} is missing)")
        refuse_code(folder)
        self.folder = folder
        self.metadata: Metadata = FileSystemReader(folder).read_metadata()
        assert isinstance(self.metadata.storage_data, dict)
        self._places = {
            (index.fqn, index.offset): place for index, place in self.metadata.storage_data.items()
        }
        self._newest: tuple[tuple[str, torch.Size], torch.Tensor] | None = None

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        kinds = self.metadata.state_dict_metadata.items()
        return sorted(name for name, kind in kinds if isinstance(kind, TensorStorageMetadata))

    @property
    def objects(self) -> list[str]:
        """Names of what is no tensor, sorted."""
        kinds = self.metadata.state_dict_metadata.items()
        return sorted(name for name, kind in kinds if isinstance(kind, BytesStorageMetadata))

    def tensor(self, name: str) -> TensorStorageMetadata:
        """Shape, type and pieces of the tensor ``name``."""
        found = self.metadata.state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def read(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """One piece of a tensor; the newest one is kept."""
        key = (name, chunk.offsets)
        if self._newest is None or self._newest[0] != key:
            self._newest = None  # before the next one is read
            content = io.BytesIO(self._bytes(name, offsets=chunk.offsets))
            self._newest = key, torch.load(content, map_location="cpu", weights_only=True)
        return self._newest[1]

    def read_object(self, name: str) -> io.BytesIO:
        """What is no tensor, as the bytes it was written as."""
        return io.BytesIO(self._bytes(name, offsets=None))

    def _bytes(self, name: str, *, offsets: torch.Size | None) -> bytes:
        place = self._places[name, offsets]
        with (self.folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            return file.read(place.length)


def convert_state(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype,
    optimizer: bool,
    message: Callable[[str], object],
) -> None:
    """Write the state in the folder ``source`` into the existing folder ``target``, and compare.

    Args:
        dtype: of the parameters.
        optimizer: whether to take the optimizer's tensors along.
        message: told how far it got.

    Raises:
        CheckpointError: the source is damaged or would run code, or what was written reads back
            differently.
        OSError: the target cannot be written.
    """
    files = StateFiles(source)
    tensors = _tensors(files, dtype=dtype, optimizer=optimizer)
    writer = FileSystemWriter(target, sync_files=False)
    planner = _Streaming(files, tensors=tensors)
    results: list[WriteResult] = []
    total = sum(_size(item) for item in planner.items)
    done = 0
    for number, items in enumerate(_by_file(planner.items)):
        # Numbered like the files of ranks, which is all that a reader sees of ranks.
        (plan,) = writer.prepare_global_plan([SavePlan(items=items)])
        plan = replace(plan, storage_data=replace(plan.storage_data, prefix=f"__{number}_"))
        future = writer.write_data(plan, planner)
        future.wait()
        results += future.value()
        done += sum(_size(item) for item in items)
        message(f"written {done / 1e9:.3g} of {total / 1e9:.3g} GB")
    writer.finish(planner.contents(), [results])
    for path in source.iterdir():
        if path.is_file() and path.name != METADATA and path.suffix != ".distcp":
            shutil.copyfile(path, target / path.name)
    _compare(StateFiles(target), files=files, tensors=tensors)


def _tensors(files: StateFiles, *, dtype: torch.dtype, optimizer: bool) -> list[_Tensor]:
    found: list[_Tensor] = []
    names = set(files.names)
    for name in files.names:
        if name.startswith(_OPTIMIZER):
            if optimizer and not name.startswith(_MASTER):
                found.append(_Tensor(name=name, origin=name, dtype=None))
            continue
        has = files.tensor(name).properties.dtype
        if not has.is_floating_point:
            found.append(_Tensor(name=name, origin=name, dtype=None))
            continue
        truth = _MASTER + name if _MASTER + name in names else name
        found.append(_Tensor(name=name, origin=name if has is dtype else truth, dtype=dtype))
        # A frozen weight has no moments, and no master either.
        if optimizer and dtype is not torch.float32 and f"{_OPTIMIZER}{MOMENTS[0]}.{name}" in names:
            found.append(_Tensor(name=_MASTER + name, origin=truth, dtype=torch.float32))
    return found


class _Streaming(SavePlanner):
    """Gives torch's writer one piece after the other, read when it is asked for."""

    def __init__(self, files: StateFiles, *, tensors: list[_Tensor]) -> None:
        self.files, self.tensors = files, tensors
        self.items: list[WriteItem] = []
        self._pieces: dict[MetadataIndex, tuple[_Tensor, ChunkStorageMetadata, tuple[slice, ...]]]
        self._pieces = {}
        for name in files.objects:
            self.items.append(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO))
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: _Tensor) -> None:
        kind = self.files.tensor(tensor.origin)
        properties = replace(kind.properties, dtype=tensor.dtype or kind.properties.dtype)
        for chunk in kind.chunks:
            for part in _divided(chunk.sizes, item_bytes=kind.properties.dtype.itemsize):
                offsets = torch.Size(
                    start + cut.start for start, cut in zip(chunk.offsets, part, strict=True)
                )
                sizes = torch.Size(cut.stop - cut.start for cut in part)
                index = MetadataIndex(tensor.name, offsets)
                self._pieces[index] = tensor, chunk, part
                self.items.append(
                    WriteItem(
                        index=index,
                        type=WriteItemType.SHARD,
                        tensor_data=TensorWriteData(
                            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                            properties=properties,
                            size=kind.size,
                        ),
                    )
                )

    def contents(self) -> Metadata:
        """The table of contents of what the items write."""
        kinds: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for item in self.items:
            data, name = item.tensor_data, item.index.fqn
            if data is None:
                kinds[name] = BytesStorageMetadata()
                continue
            kind = kinds.setdefault(
                name,
                TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[]),
            )
            assert isinstance(kind, TensorStorageMetadata)
            kind.chunks.append(data.chunk)
        return Metadata(state_dict_metadata=kinds)  # type: ignore[arg-type]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.tensor_data is None:
            return self.files.read_object(write_item.index.fqn)
        tensor, chunk, part = self._pieces[write_item.index]
        piece = self.files.read(tensor.origin, chunk)[part]
        return piece.to(tensor.dtype or piece.dtype).contiguous()

    # The rest of the interface belongs to planning, which is done by then.
    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def create_local_plan(self) -> SavePlan:
        return SavePlan(items=self.items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, self.contents()

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def _divided(sizes: torch.Size, *, item_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Parts of a piece, none larger than CHUNK_BYTES, cut along the axes in order."""
    steps: list[int] = []
    for axis, size in enumerate(sizes):
        below = math.prod(sizes[axis + 1 :]) * item_bytes
        steps.append(min(size, max(1, CHUNK_BYTES // max(1, below))))
    starts = [range(0, size, max(1, step)) for size, step in zip(sizes, steps, strict=True)]
    for corner in product(*starts):
        yield tuple(
            slice(start, min(size, start + step))
            for start, size, step in zip(corner, sizes, steps, strict=True)
        )


def _size(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _by_file(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    group: list[WriteItem] = []
    size = 0
    for item in items:
        if group and size + _size(item) > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += _size(item)
    yield group


def _compare(written: StateFiles, *, files: StateFiles, tensors: list[_Tensor]) -> None:
    """Read everything back, and each source piece again, and hold them together."""
    planner = _Streaming(files, tensors=tensors)
    for item in planner.items:
        expected = planner.resolve_data(item)
        name, data = item.index.fqn, item.tensor_data
        if data is None:
            assert isinstance(expected, io.BytesIO)
            same = written.read_object(name).getvalue() == expected.getvalue()
        else:
            assert isinstance(expected, torch.Tensor)
            found = written.read(name, data.chunk)
            # As bytes: a NaN equals itself here, and -0 is not 0.
            same = found.dtype == expected.dtype and torch.equal(
                found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
            )
        if not same:
            raise CheckpointError(
                f"{name} reads back from {written.folder} differently from what was written; "
                "the disk or its memory is at fault, try another folder"
            )
