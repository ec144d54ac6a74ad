"""The demo's figures, and pictures beside what the image tokenizer makes of them."""

import io
import platform
import tarfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from emu35 import __version__
from report import Reconstruction

PACKAGES = ("torch", "megatron-core", "numpy", "pillow", "scikit-image")
SHOWN_SCENES, SHOWN_PHOTOS = 8, 8


def summarize(
    evaluation: dict[str, Any],
    *,
    tasks: Mapping[str, Any],
    verification: Mapping[str, Any],
    parallel: Mapping[str, Any],
    rewarded: Mapping[str, Any],
    seconds: Mapping[str, float],
    budget: str,
) -> dict[str, Any]:
    """``summary.json``: flat keys, the first six as documented in README.

    ``verification`` is what ``emu35 convert verify --json`` printed, ``tasks`` what
    :mod:`tuning` wrote, ``parallel`` and ``rewarded`` flat facts of the modules of those names.
    """
    got, by_chance = evaluation["accuracy"], evaluation["chance"]
    return {
        "seconds": round(sum(seconds.values()), 1),
        "colour_accuracy": got["colour"],
        "shape_accuracy": got["shape"],
        "colour_chance": by_chance["colour"],
        "shape_chance": by_chance["shape"],
        "release_logits_equal": verification["logits_equal"],
        **{f"seconds_{name}": round(value, 1) for name, value in seconds.items()},
        "place_accuracy": got["place"],
        "size_accuracy": got["size"],
        "count_accuracy": got["count"],
        **{f"tasks_{model}": found["accuracy"]["mean"] for model, found in tasks["models"].items()},
        "tasks_chance": tasks["chance"]["mean"],
        **parallel,
        **rewarded,
        "prompts": len(evaluation["prompts"]),
        "budget": budget,
        "version_emu35": __version__,
        "version_python": platform.python_version(),
        **{f"version_{name.replace('-', '_')}": version(name) for name in PACKAGES},
    }


def reconstructions(
    *, codec_folder: Path, scenes: Path, photos: Path, resolution: int
) -> list[Reconstruction]:
    """Held-out scenes and photographs, encoded and decoded."""
    from emu35.vision.codec import load_codec
    from through import through

    codec = load_codec(codec_folder)
    shown: list[Reconstruction] = []
    for name, image in (*named_scenes(scenes), *named_photos(photos)):
        original, decoded = through(codec, image, resolution=resolution)
        shown.append(Reconstruction(name=name, original=original, decoded=decoded))
    return shown


def named_scenes(path: Path) -> Iterator[tuple[str, Image.Image]]:
    with tarfile.open(path) as tar:
        for number in range(SHOWN_SCENES):
            key = f"{number:09d}"
            try:
                picture, caption = tar.extractfile(f"{key}.png"), tar.extractfile(f"{key}.txt")
            except KeyError:
                return  # fewer scenes than would be shown
            assert picture is not None
            assert caption is not None
            image = Image.open(io.BytesIO(picture.read())).convert("RGB")
            yield caption.read().decode(), image


def named_photos(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    for path in sorted(folder.glob("*-00.png"))[:SHOWN_PHOTOS]:
        with Image.open(path) as image:
            yield path.with_suffix(".txt").read_text(encoding="utf-8").strip(), image.convert("RGB")
