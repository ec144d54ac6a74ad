"""From generated pictures to accuracy against chance."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emu35.data.scenes.describe import Colour, Scene, Shape
from emu35.data.scenes.quality import read_pictures
from emu35.data.scenes.verify import FoundObject, accuracy, chance


def evaluate(prompts: list[dict[str, Any]], *, pictures: dict[str, Path]) -> dict[str, Any]:
    """Compare the picture of every prompt (by ``id``) with the scene that the prompt describes.

    A prompt without a picture counts as a picture with nothing in it.
    """
    scenes = [Scene.from_json(prompt["scene"]) for prompt in prompts]
    found = [pictures.get(prompt["id"]) for prompt in prompts]
    pixels = [pixels_of(path) if path is not None else None for path in found]
    readings = read_pictures(pixels, scenes=scenes)
    scores = [reading.score for reading in readings]
    single = [result for result in scores if result.objects == 1]
    return {
        "accuracy": asdict(accuracy(scores)),
        "accuracy_single": asdict(accuracy(single)),
        "chance": asdict(chance([reading.found for reading in readings], scenes=scenes)),
        "uniform": {"colour": 1 / len(Colour), "shape": 1 / len(Shape)},
        "prompts": [
            {
                **prompt,
                "picture": pictures[prompt["id"]].name if prompt["id"] in pictures else None,
                "found": [_words(item) for item in reading.found],
                "score": {**asdict(reading.score), "count_correct": reading.score.count_correct},
            }
            for prompt, reading in zip(prompts, readings, strict=True)
        ],
    }


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """RGB [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _words(item: FoundObject) -> str:
    place = str(item.place).replace("_", " ")
    return f"{item.size} {item.colour} {item.shape}, {place}"


def find_pictures(prompts: list[dict[str, Any]], *, folder: Path) -> dict[str, Path]:
    """The first picture of each prompt in the output folder of ``emu35 generate``, by prompt id."""
    rows = read_lines(folder / "results.jsonl")
    return {prompts[row["index"]]["id"]: folder / row["images"][0] for row in rows if row["images"]}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The values of a JSON lines file."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]
