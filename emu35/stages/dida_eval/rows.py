"""What is done stays done: one JSON file for each decoder and each loss, written whole.

Codes lie beside a decoder's file, so that what follows from the pictures (distances, samples) can
be made again without drawing any. ``made_of.json`` says of what the rows were made; rows of another
checkpoint or of other prompts would not compare, and the folder refuses them.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from emu35.data.scenes.quality import SceneQuality, Share
from emu35.data.scenes.verify import Accuracy
from emu35.errors import DataError
from emu35.stages.dida_eval.decoders import Codes, DecoderRow
from emu35.stages.output import unwritable, write_output

ROWS = "rows"
"""Folder of the rows in a run folder."""

MADE_OF = "made_of.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows below ``run_dir``; ``size`` is height and width of every picture in codes."""

    run_dir: Path
    size: tuple[int, int]

    @property
    def folder(self) -> Path:
        return self.run_dir / ROWS

    def claim(self, made_of: dict[str, Any]) -> None:
        """Take the folder for rows made of this.

        Raises:
            DataError: it holds rows made of something else, or cannot be written.
        """
        path = self.folder / MADE_OF
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        if not path.is_file():
            write_output(path, content=_json(made_of))
            return
        before = _read_json(path)
        for key, value in made_of.items():
            if before.get(key) != value:
                raise DataError(
                    f"{self.folder} holds rows of {key} {before.get(key)}, but now it is {value}; "
                    "give this evaluation another run_dir, or remove that folder"
                )

    def decoder(self, name: str, make: Callable[[], DecoderRow]) -> tuple[DecoderRow, bool]:
        """The row ``name``, made if it is not there; and whether it was.

        Raises:
            DataError: the file that is there is damaged, or cannot be written.
        """
        path, codes = self.folder / f"{name}.json", self.folder / f"{name}.npz"
        if path.is_file():
            return _decoder_row(_read_json(path), codes=_read_codes(codes), path=path), True
        row = make()
        # The codes first: a row that has its JSON file is complete.
        write_output(codes, content=_packed(row.codes, size=self.size))
        write_output(path, content=_json(row_facts(row)))
        return row, False

    def loss(self, name: str, make: Callable[[], float | None]) -> float | None:
        """The loss ``name``, computed if it is not there.

        Raises:
            DataError: as :meth:`decoder`.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_output(path, content=_json({"loss": make()}))
        return _read_json(path)["loss"]


def row_facts(row: DecoderRow) -> dict[str, Any]:
    """``row`` as JSON values, without its codes."""
    return {
        field.name: asdict(row.quality) if field.name == "quality" else getattr(row, field.name)
        for field in fields(row)
        if field.name != "codes"
    }


def digest(path: Path) -> str:
    """SHA-256 of the file ``path``."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _decoder_row(facts: dict[str, Any], *, codes: list[Codes | None], path: Path) -> DecoderRow:
    try:
        quality = facts["quality"]
        shares = {name: Share(**quality[name]) for name in ("accuracy", "right")}
        parts = Accuracy(**quality["parts"])
        known = SceneQuality(**{**quality, **shares, "parts": parts})
        return DecoderRow(**{**facts, "quality": known}, codes=codes)
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _packed(codes: Sequence[Codes | None], *, size: tuple[int, int]) -> bytes:
    """int32 [P, H, W]; -1 everywhere in a picture that never came."""
    missing_HW = np.full(size, -1, np.int32)
    codes_PHW = np.stack([missing_HW if each is None else each.astype(np.int32) for each in codes])
    stream = io.BytesIO()
    np.savez_compressed(stream, codes=codes_PHW)
    return stream.getvalue()


def _read_codes(path: Path) -> list[Codes | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            codes_PHW = file["codes"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    return [codes_HW if codes_HW.min() >= 0 else None for codes_HW in codes_PHW]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged ({error}); remove it, and the row is made again")
