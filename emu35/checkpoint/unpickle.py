"""Refusing checkpoints that would run code while they are loaded.

torch's distributed checkpoints keep their table of contents in ``.metadata``, a plain pickle that
torch loads without any restriction, and so it does with entries that are no tensors. For the
trainer, reading back what it wrote itself, that is harmless. A run folder that came from somebody
else is another matter, so everything that torch will unpickle freely is first unpickled here by a
reader that knows only the few classes such files consist of, and builds nothing else.
"""

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from emu35.checkpoint.durable import is_inside
from emu35.errors import CheckpointError

METADATA = ".metadata"

_ALLOWED = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch", name)
            for name in ("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint8")
        ),
    }
)


def refuse_code(folder: Path) -> None:
    """Check every distributed checkpoint below ``folder``.

    Files saved by ``torch.save`` need no check here: they are loaded with ``weights_only``.

    Raises:
        CheckpointError: something in it is not plain data, or points outside its folder.
    """
    for path in sorted(folder.rglob(METADATA)):
        _check(path)


class _PlainReader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not data")
        return super().find_class(module, name)


def _check(path: Path) -> None:
    try:
        with path.open("rb") as file:
            contents = _PlainReader(file).load()
    except Exception as error:  # a hostile pickle can fail in any way
        _refuse(path, error=error)
    if not isinstance(contents, Metadata) or not isinstance(contents.storage_data, dict):
        _refuse(path, error="it holds no table of contents")
    for index, place in contents.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            _refuse(path, error="it holds no table of contents")
        if not is_inside(place.relative_path):
            _refuse(path, error=f"it names {place.relative_path!r}, outside its folder")
        if place.transform_descriptors:
            _refuse(path, error="its entries are transformed, which emu35 never does")
        # Tensors are always loaded with weights_only; anything else is not.
        kind = contents.state_dict_metadata.get(index.fqn)
        if isinstance(kind, TensorStorageMetadata):
            continue
        try:
            with (path.parent / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except Exception as error:
            _refuse(path, error=f"{index.fqn}: {error}")


def _refuse(path: Path, *, error: object) -> NoReturn:
    text = str(error).strip().splitlines()
    raise CheckpointError(
        f"{path} is refused: {text[0] if text else type(error).__name__}. "
        "A checkpoint consists of tensors and plain values; do not load this one"
    )
