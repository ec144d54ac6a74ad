"""What the training of an image tokenizer leaves in its run folder for people to look at."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from emu35.stages.output import write_output
from emu35.vision.resize import to_image

RECONSTRUCTIONS = "reconstructions.png"
REJECTS = "rejects.jsonl"

GRID_COLUMNS = 8


def write_grid(pairs_B23HW: torch.Tensor, *, path: Path) -> None:
    """Originals above reconstructions, in double rows of :data:`GRID_COLUMNS`, as PNG.

    Raises:
        DataError: the file cannot be written.
    """
    count, _, _, height, width = pairs_B23HW.shape
    rows = 2 * math.ceil(count / GRID_COLUMNS)
    canvas = Image.new("RGB", (min(GRID_COLUMNS, count) * width, rows * height), "white")
    for index, pair_23HW in enumerate(pairs_B23HW.numpy()):
        row, column = divmod(index, GRID_COLUMNS)
        for below, pixels_3HW in enumerate(pair_23HW):
            canvas.paste(to_image(pixels_3HW), (column * width, (2 * row + below) * height))
    stream = io.BytesIO()
    canvas.save(stream, format="PNG")
    write_output(path, content=stream.getvalue())


def write_rejects(path: Path, *, reasons: Sequence[Mapping[str, str]]) -> None:
    """Write the pictures that could not be used (name -> reason, a mapping a rank), and those
    already in the file, as JSON lines sorted by name; no file where there is none to name.

    Raises:
        DataError: the file cannot be written.
    """
    merged = dict(_read_rejects(path))
    for found in reasons:
        merged.update(found)
    if not merged:
        return
    # ASCII: a file name may hold bytes that are no UTF-8, and characters that end a line.
    rows = [json.dumps({"picture": name, "reason": merged[name]}) for name in sorted(merged)]
    write_output(path, content=("\n".join(rows) + "\n").encode("ascii"))


def _read_rejects(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            yield row["picture"], row["reason"]
