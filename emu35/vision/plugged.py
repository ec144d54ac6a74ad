"""Image tokenizers of other packages: a folder with ``codec.yaml`` names the code that opens it.

``codec.yaml``::

    codec: their_package.tokenizer:open_codec   # module:factory, importable where emu35 runs
    factor: 16                                  # pixels per code along each side
    codebook_size: 16384
    dtype: float32                              # what codes are computed in (default float32)
    arguments: {name: value}                    # keyword arguments of the factory (default none)

The factory is called as ``factory(folder=..., device=..., **arguments)`` and returns an object with
``factor``, ``codebook_size``, ``encode`` and ``decode`` of
:class:`~emu35.vision.codec.ImageCodec`; ``latents`` and ``codebook_KD`` (fp32 [K, D]) are for what
measures distances between codes. Whatever else lies in the folder, such as weights, is its own, and
belongs to the digest that shards remember.

Importing what a file names runs code, so it has to be asked for: with ``--trust-codec`` where a
command has it, and in the environment (:data:`TRUST_VARIABLE`) for everything else.
"""

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from emu35.errors import DataError, ReleaseError

PLUG = "codec.yaml"
TRUST_VARIABLE = "EMU35_TRUST_CODEC"

_FIELDS = {"codec": str, "factor": int, "codebook_size": int, "dtype": str, "arguments": dict}
_NEEDED = ("codec", "factor", "codebook_size")
_BYTECODE = "__pycache__"
_PROBE_GRID = (2, 3)
"""Rows and columns of the picture that a codec is tried with; unequal, so that a swap shows."""


class CodecTrust(Enum):
    """Whether code that a tokenizer's folder names may be run: if the environment says so (the
    default), or because the user asked for it."""

    environment = "environment"
    given = "given"

    @property
    def allows(self) -> bool:
        return self is CodecTrust.given or os.environ.get(TRUST_VARIABLE) == "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plug:
    """What ``codec.yaml`` says."""

    codec: str
    factor: int
    codebook_size: int
    dtype: str
    arguments: dict[str, Any]


def is_plugged(folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` is of another package."""
    return (folder / PLUG).is_file()


def read_plug(folder: Path) -> Plug:
    """What ``codec.yaml`` in ``folder`` says; runs no code.

    Raises:
        ReleaseError: it cannot be read, or says something else.
    """
    path = folder / PLUG
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror}); copy it again") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{path} is not YAML ({error}); write it again") from error
    values = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    problems = [f"lacks {name}" for name in _NEEDED if name not in values]
    problems += [f"has unknown {name}" for name in values if name not in _FIELDS]
    problems += [
        f"{name}={value!r} must be of type {_FIELDS[name].__name__}"
        for name, value in values.items()
        if name in _FIELDS and type(value) is not _FIELDS[name]
    ]
    if not problems:
        module, colon, factory = values["codec"].partition(":")
        if not (module and colon and factory):
            problems.append(f"codec={values['codec']!r} must be module:factory")
        problems += [
            f"{name}={values[name]} must be at least 1"
            for name in ("factor", "codebook_size")
            if values[name] < 1
        ]
    if problems:
        raise ReleaseError(
            f"{path}: {'; '.join(problems)}; it must have {', '.join(_NEEDED)} and may have "
            "dtype and arguments"
        )
    return Plug(**{"dtype": "float32", "arguments": {}, **values})


def plugged_digest(folder: Path) -> str:
    """SHA-256 over the names and the bytes of all files below ``folder``. Hidden ones are left out,
    and what Python writes beside code that it imports.

    Raises:
        OSError: one cannot be read.
    """
    sha = hashlib.sha256()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name, path in sorted(paths.items()):
        parts = Path(name).parts
        left_out = _BYTECODE in parts or any(part.startswith(".") for part in parts)
        if path.is_file() and not left_out:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            sha.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()


def load_plugged(folder: Path, *, device: torch.device, trust: CodecTrust) -> "PluggedCodec":
    """The codec that ``codec.yaml`` in ``folder`` names, on ``device``, tried with one picture.

    Raises:
        ReleaseError: nobody asked for its code to be run, it cannot be imported or opened, or is
            not what ``codec.yaml`` says.
    """
    plug = read_plug(folder)
    if not trust.allows:
        raise ReleaseError(
            f"{folder} is opened by code that it names, {plug.codec}, and nobody asked for that to "
            f"be run. If you trust it, give --trust-codec or set {TRUST_VARIABLE}=1"
        )
    factory = _factory(plug, path=folder / PLUG)
    try:
        codec = factory(folder=folder, device=device, **plug.arguments)
    # Code of others fails in ways of its own; the cause stays attached.
    except Exception as error:
        raise ReleaseError(
            f"{plug.codec} cannot open {folder}: {type(error).__name__}: {error}; check the folder "
            "and its arguments"
        ) from error
    plugged = PluggedCodec(codec, plug=plug, name=f"{folder} ({plug.codec})")
    rows, columns = _PROBE_GRID
    pixels_B3HW = torch.zeros(1, 3, rows * plug.factor, columns * plug.factor)
    try:
        plugged.decode(plugged.encode(pixels_B3HW))
    except DataError as error:
        raise ReleaseError(f"{error}; mend the codec") from error
    except Exception as error:
        raise ReleaseError(
            f"{folder} ({plug.codec}) fails on a picture of {rows * plug.factor} x "
            f"{columns * plug.factor} pixels: {type(error).__name__}: {error}; any multiple of its "
            "factor must do"
        ) from error
    return plugged


class PluggedCodec:
    """A codec of another package as an :class:`~emu35.vision.codec.ImageCodec`: what goes in and
    what comes out is checked, so that a mistake in it shows where it is made."""

    def __init__(self, codec: Any, *, plug: Plug, name: str) -> None:
        """Raises: ReleaseError if ``codec`` lacks something, or is not what ``plug`` says."""
        problems = [
            f"{member} is {getattr(codec, member, 'missing')!r}, but {PLUG} says {said}"
            for member, said in (("factor", plug.factor), ("codebook_size", plug.codebook_size))
            if getattr(codec, member, None) != said
        ]
        problems += [
            f"{member} is no method"
            for member in ("encode", "decode")
            if not callable(getattr(codec, member, None))
        ]
        if problems:
            raise ReleaseError(f"{name} is no image codec: {'; '.join(problems)}")
        self._codec = codec
        self._plug = plug
        self._name = name

    @property
    def factor(self) -> int:
        return self._plug.factor

    @property
    def codebook_size(self) -> int:
        return self._plug.codebook_size

    @torch.no_grad()
    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, H / factor, W / factor]`` int64 of pixels in [-1, 1].

        Raises:
            DataError: a side is no positive multiple of ``factor``, or the codec answers with
                something else than such codes.
        """
        batch, rows, columns = self._grid(pixels_B3HW)
        codes_BHW: Any = self._codec.encode(pixels_B3HW)
        self._check(codes_BHW, method="encode", shape=(batch, rows, columns))
        if codes_BHW.is_floating_point() or codes_BHW.is_complex():
            raise DataError(f"{self._name}: encode gave {codes_BHW.dtype}; codes are integers")
        self._check_range(codes_BHW, what="encode gave codes")
        return codes_BHW.to(pixels_B3HW.device, torch.int64)

    @torch.no_grad()
    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H * factor, W * factor]``, clamped to [-1, 1].

        Raises:
            DataError: the codes are not a non-empty ``[B, H, W]`` within the codebook, or the codec
                answers with something else than such pixels.
        """
        shape = tuple(codes_BHW.shape)
        if len(shape) != 3 or 0 in shape:
            raise DataError(f"codes of shape {shape}: an image codec decodes [B, H, W]")
        self._check_range(codes_BHW, what="asked to decode codes")
        pixels_B3HW: Any = self._codec.decode(codes_BHW)
        sides = (shape[1] * self.factor, shape[2] * self.factor)
        self._check(pixels_B3HW, method="decode", shape=(shape[0], 3, *sides))
        if not pixels_B3HW.is_floating_point() or not bool(pixels_B3HW.isfinite().all()):
            raise DataError(f"{self._name}: decode must give finite floating-point pixels")
        return pixels_B3HW.to(codes_BHW.device, torch.float32).clamp(-1, 1)

    @torch.no_grad()
    def latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Vectors ``[B, D, H / factor, W / factor]`` fp32 that codes are found for.

        Raises:
            DataError: the codec has none, or answers with something else.
        """
        batch, rows, columns = self._grid(pixels_B3HW)
        if not callable(getattr(self._codec, "latents", None)):
            raise DataError(
                f"{self._name} has no method latents, which this needs; add it to the codec"
            )
        latents_BDHW: Any = self._codec.latents(pixels_B3HW)
        dim = latents_BDHW.shape[1:2] if isinstance(latents_BDHW, torch.Tensor) else ()
        self._check(latents_BDHW, method="latents", shape=(batch, *dim, rows, columns))
        return latents_BDHW.to(pixels_B3HW.device, torch.float32)

    @property
    def codebook_KD(self) -> torch.Tensor:
        """The embeddings of the codes, fp32 [K, D].

        Raises:
            ReleaseError: the codec has none, or of another shape.
        """
        codebook_KD: Any = getattr(self._codec, "codebook_KD", None)
        if not isinstance(codebook_KD, torch.Tensor) or codebook_KD.ndim != 2:
            raise ReleaseError(
                f"{self._name} has no codebook_KD, which this needs: a tensor [K, D]; add it to "
                "the codec"
            )
        if len(codebook_KD) != self.codebook_size or not bool(codebook_KD.isfinite().all()):
            raise ReleaseError(
                f"{self._name}: codebook_KD of shape {list(codebook_KD.shape)} must have "
                f"{self.codebook_size} rows of finite numbers; mend the codec"
            )
        return codebook_KD.detach().to("cpu", torch.float32)

    def _grid(self, pixels_B3HW: torch.Tensor) -> tuple[int, int, int]:
        shape, factor = tuple(pixels_B3HW.shape), self.factor
        if len(shape) != 4 or shape[1] != 3:
            raise DataError(f"pixels of shape {shape}: an image codec encodes [B, 3, H, W]")
        height, width = shape[2:]
        if min(height, width) < factor or height % factor or width % factor:
            raise DataError(
                f"picture of {width} x {height} pixels: both sides must be multiples of {factor}; "
                "resize it with smart_resize first"
            )
        return shape[0], height // factor, width // factor

    def _check(self, found: Any, *, method: str, shape: tuple[int, ...]) -> None:
        if not isinstance(found, torch.Tensor):
            raise DataError(
                f"{self._name}: {method} gave {type(found).__name__}, not a torch.Tensor"
            )
        if tuple(found.shape) != shape:
            raise DataError(
                f"{self._name}: {method} gave shape {list(found.shape)}, not {list(shape)}"
            )

    def _check_range(self, codes_BHW: torch.Tensor, *, what: str) -> None:
        lowest, highest = int(codes_BHW.min()), int(codes_BHW.max())
        if lowest < 0 or highest >= self.codebook_size:
            raise DataError(
                f"{self._name}: {what} from {lowest} to {highest}, but the codebook has "
                f"{self.codebook_size} entries"
            )


def _factory(plug: Plug, *, path: Path) -> Callable[..., Any]:
    name, _, attribute = plug.codec.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing runs the module, which may fail in any way
        raise ReleaseError(
            f"{path} names {plug.codec}, but {name} cannot be imported "
            f"({type(error).__name__}: {error}); install its package where emu35 runs"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ReleaseError(f"{path} names {plug.codec}, but {name} has no callable {attribute!r}")
    return factory
