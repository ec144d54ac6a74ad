"""What generation leaves on disk."""

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emu35.inference.request import Generated
from emu35.stages.output import unwritable, write_output
from emu35.tokens.document import Image, Special, Text
from emu35.vision.codec import ImageCodec
from emu35.vision.resize import to_image

RESULTS = "results.jsonl"


class GeneratedFiles:
    """Writes answers below ``folder``: prompt, images and text of each, and ``results.jsonl``.

    Files that an earlier call listed in the same ``results.jsonl`` are removed first, so that
    nothing of it survives between the new ones. That holds wherever the earlier call was killed:
    an answer is listed before its files are written.

    Raises:
        DataError: (from every method) naming a path that cannot be written, and why.
    """

    def __init__(
        self, *, folder: Path, prompts: Sequence[str], seed: int, codec: ImageCodec
    ) -> None:
        self.folder = folder
        self._prompts = prompts
        self._seed = seed
        self._codec = codec
        self._rows: dict[int, dict[str, Any]] = {}
        # Three digits at least, and as many as all names need to sort in order.
        self._digits = max(3, len(str(len(prompts) - 1)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_earlier()
        except OSError as error:
            raise unwritable(folder, error) from error

    def write(self, answers: Sequence[Generated]) -> None:
        """List, decode and write ``answers``."""
        rows = {answer.index: self._row(answer) for answer in answers}
        self._append(rows.values())
        self._rows |= rows
        grids = [(a.index, k, g) for a in answers for k, g in enumerate(a.document.images)]
        pictures = decode_images([codes_HW for _, _, codes_HW in grids], codec=self._codec)
        for (index, k, _), png in zip(grids, pictures, strict=True):
            self._put(self._image_name(index, k), content=png)
        for answer in answers:
            self._put(f"{self._prefix(answer.index)}_prompt.txt", content=self._prompt(answer))
            if text := _text(answer):
                self._put(f"{self._prefix(answer.index)}_text.txt", content=text)

    def finish(self) -> None:
        """Write the rows of all answers so far, in order of their prompts."""
        rows = [self._rows[index] for index in sorted(self._rows)]
        self._put(RESULTS, content=_lines(rows))

    def _row(self, answer: Generated) -> dict[str, Any]:
        prefix, document = self._prefix(answer.index), answer.document
        images = [self._image_name(answer.index, k) for k in range(len(document.images))]
        words = [f"{prefix}_prompt.txt", *([f"{prefix}_text.txt"] if _text(answer) else [])]
        return {
            "index": answer.index,
            "prompt": self._prompts[answer.index],
            "seed": self._seed,
            "finish": answer.finish.value,
            "ids": answer.ids,
            "images": images,
            "sizes": [list(codes_HW.shape) for codes_HW in document.images],
            "parts": self._parts(answer),
            "problems": document.problems,
            "files": words + images,
        }

    def _parts(self, answer: Generated) -> list[dict[str, str]]:
        """The answer in reading order; what is broken is in ``problems``."""
        parts: list[dict[str, str]] = []
        images = 0
        for part in answer.document.parts:
            if isinstance(part, Text):
                parts.append({"text": part.text})
            elif isinstance(part, Special):
                parts.append({"special": part.token})
            elif isinstance(part, Image):
                parts.append({"image": self._image_name(answer.index, images)})
                images += 1
        return parts

    def _prefix(self, index: int) -> str:
        return f"{index:0{self._digits}d}"

    def _image_name(self, index: int, k: int) -> str:
        return f"{self._prefix(index)}_{k:02d}_image.png"

    def _prompt(self, answer: Generated) -> bytes:
        return self._prompts[answer.index].encode(errors="replace") + b"\n"

    def _put(self, name: str, *, content: bytes) -> None:
        write_output(self.folder / name, content=content)

    def _append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows to the end of the results: writing them all anew each time would make the cost
        grow with the square of the prompts. A line torn by a kill lists files not yet begun."""
        path = self.folder / RESULTS
        if not (content := _lines(rows)):
            return
        try:
            with path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(path, error) from error

    def _remove_earlier(self) -> None:
        results = self.folder / RESULTS
        if not results.is_file():
            return
        for line in results.read_text(errors="replace").splitlines():
            try:
                names = json.loads(line)["files"]
            except (ValueError, KeyError, TypeError):
                continue  # not a row of ours: then its files are not ours to remove either
            for name in names:
                # A base name only: a row must not reach outside the folder.
                (self.folder / Path(str(name)).name).unlink(missing_ok=True)
        results.unlink()


def decode_images(grids: Sequence[np.ndarray], *, codec: ImageCodec) -> list[bytes]:
    """PNG bytes of every grid of codes [H, W]; grids of one size are decoded together."""
    places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, codes_HW in enumerate(grids):
        places[codes_HW.shape].append(at)
    pictures: list[bytes] = [b""] * len(grids)
    for chosen in places.values():
        codes_BHW = torch.from_numpy(np.stack([grids[at] for at in chosen]).astype(np.int64))
        pixels_B3HW = codec.decode(codes_BHW).cpu().numpy()
        for at, pixels_3HW in zip(chosen, pixels_B3HW, strict=True):
            stream = io.BytesIO()
            to_image(pixels_3HW).save(stream, format="PNG")
            pictures[at] = stream.getvalue()
    return pictures


def _text(answer: Generated) -> bytes:
    """The texts of an answer as a file; empty where there is none."""
    text = "\n\n".join(part.strip() for part in answer.document.texts if part.strip())
    return text.encode() + b"\n" if text else b""


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
