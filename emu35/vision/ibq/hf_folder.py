"""A tokenizer as folders on the Hugging Face hub are laid out: ``config.json`` and
``model.safetensors``.

``config.json`` names every field of :class:`~emu35.config.IBQConfig`; the weights have the names of
the official release and are fp32. Neither file can run code. Codes belong to weights, not to a
layout: ``weights`` notes which folder they come from (:mod:`emu35.vision.ibq.identity`).
"""

import json
import stat
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from emu35.errors import ReleaseError
from emu35.files import replacing, write_atomically
from emu35.vision.ibq.identity import file_digest, note_of, noted_digest
from emu35.vision.ibq.model import IBQ
from emu35.vision.ibq.state import CODEBOOK

HF_CONFIG = "config.json"
HF_WEIGHTS = "model.safetensors"
MODEL_TYPE = "ibq"

_ARCHITECTURE = "IBQ"
_METADATA = {"format": "pt"}  # readers refuse files that do not say so


def write_hf_folder(model: IBQ, *, folder: Path, digest: str | None = None) -> None:
    """Write both files, each atomically, the config last; parameters are stored in fp32.

    Args:
        digest: what shards remember of the folder that these weights come from; None for the
            weights file's own.

    Raises:
        ReleaseError: the folder cannot be written.
    """
    state = {
        # Copied, because parts of one storage cannot be expressed in the format.
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    path = folder / HF_WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            # The library makes files that only their owner can read; ours are made as any other.
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            save_file(state, temporary, metadata=_METADATA)
            temporary.chmod(mode)
        note = note_of(file_digest(path), digest=digest)
        content = {
            "architectures": [_ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "torch_dtype": "float32",
            **{name: value for name, value in asdict(model.config).items() if name != "kind"},
            "weights": note,
        }
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / HF_CONFIG, content=text.encode("ascii"))
    except (OSError, SafetensorError) as error:
        raise ReleaseError(
            f"cannot write the vision tokenizer to {folder} ({error}); "
            "free some space or choose another folder"
        ) from error


def read_hf_fields(folder: Path) -> dict[str, Any]:
    """The fields of ``config.json``.

    Raises:
        ReleaseError: it cannot be read, or is not that of an IBQ tokenizer.
    """
    path = folder / HF_CONFIG
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror}); copy it again") from error
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is not JSON ({error}); write the folder again") from error
    kind = cast(dict[str, Any], content).get("model_type") if isinstance(content, dict) else None
    if kind != MODEL_TYPE:
        raise ReleaseError(
            f"{path} has model_type {kind!r}, not {MODEL_TYPE!r}: it is no IBQ tokenizer; give the "
            "folder of one"
        )
    return cast(dict[str, Any], content)


def read_hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors.

    Raises:
        ReleaseError: the file is missing or damaged.
    """
    path = folder / HF_WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def read_hf_codebook(folder: Path) -> torch.Tensor | None:
    """The codebook alone, or None where there is none.

    Raises:
        ReleaseError: the file is missing or damaged.
    """
    path = folder / HF_WEIGHTS
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return file.get_tensor(CODEBOOK) if CODEBOOK in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def hf_digest(folder: Path) -> str:
    """What shards remember of the weights; see :mod:`emu35.vision.ibq.identity`.

    Raises:
        OSError: they cannot be read.
        ReleaseError: the config cannot be read.
    """
    own = file_digest(folder / HF_WEIGHTS)
    return noted_digest(read_hf_fields(folder).get("weights"), own=own)


def _unreadable(path: Path, error: Exception) -> ReleaseError:
    if isinstance(error, FileNotFoundError):
        return ReleaseError(f"{path} is missing; the folder must hold {HF_CONFIG} and it")
    return ReleaseError(f"{path} is damaged or no safetensors file ({error}); copy it again")
