"""The release folder of a tokenizer: ``config.yaml`` and ``model.ckpt``, readable by the official
inference code. Folders of the other layout (:mod:`emu35.vision.ibq.hf_folder`) are read as well.

``config.yaml`` is flat and becomes keyword arguments there: ``ddconfig`` for encoder and decoder,
then ``n_embed`` and ``embed_dim``. Two defaults of that code must be overridden in it: ``double_z``
(else the encoder is built with twice the channels) and the entropy loss. ``model.ckpt`` is a plain
dictionary of tensors; it is read with ``weights_only``, so it cannot run code. A third file,
``origin.json``, is there where the weights come from a folder of the other layout
(:mod:`emu35.vision.ibq.identity`).
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.overrides import TorchFunctionMode

from emu35.config import IBQConfig
from emu35.errors import ReleaseError
from emu35.files import replacing, write_atomically
from emu35.vision.ibq.hf_folder import (
    HF_CONFIG,
    HF_WEIGHTS,
    hf_digest,
    read_hf_codebook,
    read_hf_fields,
    read_hf_weights,
)
from emu35.vision.ibq.identity import file_digest, note_of, noted_digest
from emu35.vision.ibq.model import IBQ
from emu35.vision.ibq.state import CODEBOOK, check_state

CONFIG = "config.yaml"
WEIGHTS = "model.ckpt"
ORIGIN = "origin.json"

DDCONFIG_FIELDS = (
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "resolution",
    "z_channels",
    "in_channels",
    "out_ch",
    "dropout",
)
FLAT_FIELDS = ("n_embed", "embed_dim")

_FIXED = {
    "double_z": False,
    "resamp_with_conv": True,
    "tanh_out": False,
    "give_pre_end": False,
    "cosine_similarity": False,
    "l2_normalize": False,
}
"""Switches of the official code that IBQ has in one position alone; configs need not name them."""

RELEASED_GROUPS = 32
"""Groups of every normalisation in released tokenizers, a constant of the official code."""


class Layout(StrEnum):
    """``official``: ``config.yaml`` and ``model.ckpt``. ``hf``: ``config.json`` and
    ``model.safetensors``."""

    official = "official"
    hf = "hf"


def layout_of(folder: Path) -> Layout:
    """The layout of ``folder``; official where nothing says otherwise, or both are there."""
    other = not (folder / CONFIG).is_file() and (folder / HF_CONFIG).is_file()
    return Layout.hf if other else Layout.official


def write_folder(model: IBQ, *, folder: Path, digest: str | None = None) -> None:
    """Write both files, each atomically, the config last; parameters are stored in fp32.

    Args:
        digest: what shards remember of the folder that these weights come from; None for the
            weights file's own.

    Raises:
        ReleaseError: the folder cannot be written.
    """
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as path, path.open("wb") as file:
            # Given a name, it would put that into the file, and ours is another every time.
            torch.save(state, file)
        own = file_digest(folder / WEIGHTS) if digest is not None else None
        if own != digest:
            note = json.dumps(note_of(own or "", digest=digest), indent=2) + "\n"
            write_atomically(folder / ORIGIN, content=note.encode("ascii"))
        with replacing(folder / CONFIG) as path:
            path.write_text(yaml.safe_dump(config_to_yaml(model.config), sort_keys=False))
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError.
        raise ReleaseError(
            f"cannot write the vision tokenizer to {folder} ({error}); "
            "free some space or choose another folder"
        ) from error


class _Undrawn(TorchFunctionMode):
    """Initial values are not drawn for parameters whose weights are read anyway. On ``meta`` a draw
    of normal numbers computes nothing and yet imports torch's compiler, a fifth of what it takes to
    start ``emu35 generate``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def read_folder(folder: Path) -> IBQ:
    """The model in ``folder``, in fp32 on the CPU, in evaluation mode.

    Raises:
        ReleaseError: a file is missing or damaged, or keys or shapes are not those that the
            config describes.
    """
    config = read_config(folder)
    with torch.device("meta"), _Undrawn():
        model = IBQ(config)
    if layout_of(folder) is Layout.hf:
        names, state = (HF_WEIGHTS, HF_CONFIG), read_hf_weights(folder)
    else:
        names, state = (WEIGHTS, CONFIG), _read_weights(folder / WEIGHTS)
    check_state(state, expected=model.state_dict(), path=folder / names[0], config=names[1])
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model.eval()


def ibq_digest(folder: Path) -> str:
    """What shards remember of the weights in ``folder``; see :mod:`emu35.vision.ibq.identity`.

    Raises:
        OSError: they cannot be read.
        ReleaseError: what is beside them cannot be read.
    """
    if layout_of(folder) is Layout.hf:
        return hf_digest(folder)
    own = file_digest(folder / WEIGHTS)
    path = folder / ORIGIN
    try:
        note: Any = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} is not JSON ({error}); convert the folder again") from error
    return noted_digest(note, own=own)


def ibq_codebook(folder: Path) -> torch.Tensor:
    """The codebook of the model in ``folder``, fp32 [K, D].

    Raises:
        ReleaseError: as :func:`read_folder`.
    """
    config = read_config(folder)
    if layout_of(folder) is Layout.hf:
        path, beside, codebook_KD = folder / HF_WEIGHTS, HF_CONFIG, read_hf_codebook(folder)
    else:
        path, beside = folder / WEIGHTS, CONFIG
        codebook_KD = _read_weights(path, mapped=True).get(CODEBOOK)
    if codebook_KD is None or codebook_KD.shape != (config.n_embed, config.embed_dim):
        found = "missing" if codebook_KD is None else f"of shape {list(codebook_KD.shape)}"
        raise ReleaseError(
            f"{path}: {CODEBOOK} is {found}, but {beside} describes "
            f"[{config.n_embed}, {config.embed_dim}]; copy the folder again"
        )
    if not bool(codebook_KD.isfinite().all()):
        raise ReleaseError(
            f"{path}: {CODEBOOK} holds NaN or infinity: the tokenizer diverged; train it again "
            "with a lower optim.lr, or use another one"
        )
    return codebook_KD.float().clone()  # the file may change under a mapping


def read_config(folder: Path) -> IBQConfig:
    """The architecture in ``folder``, without reading the weights.

    Raises:
        ReleaseError: the config is missing, not YAML (JSON), or not of an IBQ tokenizer.
    """
    if layout_of(folder) is Layout.hf:
        path = folder / HF_CONFIG
        return _checked(_config_of(read_hf_fields(folder), path=path), path)
    path = folder / CONFIG
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReleaseError(
            f"no vision tokenizer in {folder}: {path} cannot be read ({error.strerror}); "
            f"the folder must hold {CONFIG} and {WEIGHTS}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{path} is not YAML ({error}); write the folder again") from error
    return _checked(config_from_yaml(values, path=path), path)


def _checked(config: IBQConfig, path: Path) -> IBQConfig:
    """Raises: ReleaseError if there is no such network."""
    problems = list(config.problems())
    if problems:
        raise ReleaseError(f"{path} describes no valid tokenizer: " + "; ".join(problems))
    return config


def config_to_yaml(config: IBQConfig) -> dict[str, Any]:
    """The content of ``config.yaml``."""
    ddconfig: dict[str, Any] = {"double_z": False}
    for name in DDCONFIG_FIELDS:
        value = getattr(config, name)
        ddconfig[name] = list(value) if isinstance(value, list) else value
    flat = {name: getattr(config, name) for name in FLAT_FIELDS}
    values = {"ddconfig": ddconfig, **flat, "beta": 0.25, "use_entropy_loss": False}
    if config.norm_groups != RELEASED_GROUPS:
        # Outside what the official code reads: it would load the weights and compute otherwise.
        values["norm_groups"] = config.norm_groups
    return values


def config_from_yaml(values: object, *, path: Path) -> IBQConfig:
    """The inverse of :func:`config_to_yaml`; keys that only concern training are ignored.

    Raises:
        ReleaseError: a field is missing or of another type, or the tokenizer is of another kind.
    """
    if not isinstance(values, dict) or not isinstance(values.get("ddconfig"), dict):
        raise ReleaseError(f"{path} has no section 'ddconfig'; it is not an IBQ tokenizer")
    ddconfig = values["ddconfig"]
    flat = {name: values[name] for name in (*FLAT_FIELDS, "norm_groups", *_FIXED) if name in values}
    return _config_of({**ddconfig, **flat}, path=path)


def _config_of(values: Mapping[str, Any], *, path: Path) -> IBQConfig:
    """The config whose fields are in ``values``; whatever else is there concerns training or other
    readers. Raises: ReleaseError if a field is missing or of another type."""
    for name, expected in _FIXED.items():
        if name in values and bool(values[name]) is not expected:
            raise ReleaseError(
                f"{path}: {name} is {values[name]!r}, but an IBQ tokenizer has {expected!r}: with "
                "these weights it would compute something else"
            )
    wanted = (*DDCONFIG_FIELDS, *FLAT_FIELDS)
    found = {name: values[name] for name in (*wanted, "norm_groups") if name in values}
    # Dropout alone does not shape the network, so an absent one means none.
    missing = [name for name in wanted if name not in {*found, "dropout"}]
    if missing:
        raise ReleaseError(f"{path} lacks {', '.join(missing)}; an IBQ tokenizer needs them")
    kinds = {field.name: field.type for field in fields(IBQConfig)}
    for name, value in found.items():
        if not _is_a(value, kind=kinds[name]):
            raise ReleaseError(f"{path}: {name}={value!r} must be of type {_name(kinds[name])}")
    return IBQConfig(**found)


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _is_a(value: object, *, kind: Any) -> bool:
    if kind in (int, "int"):
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (float, "float"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, list) and all(_is_a(item, kind=int) for item in value)


def _read_weights(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """All tensors; ``mapped``, their bytes are read when they are used, where the format permits
    it, so that who wants one reads one."""
    try:
        state = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=mapped and zipfile.is_zipfile(path),
        )
    except FileNotFoundError as error:
        raise ReleaseError(f"{path} is missing; the folder must hold {CONFIG} and it") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ReleaseError(
            f"{path} cannot be read as a dictionary of tensors ({reason}); "
            "it is damaged or holds something else; copy it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise ReleaseError(f"{path} must hold a dictionary of tensors and nothing else")
    return state
