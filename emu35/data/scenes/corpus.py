"""Scenes as files: webdataset tars in the layout that img2dataset writes, and prompts to test with.

A tar holds, per picture, ``000000000.png``, ``.txt`` (the caption) and ``.json``, whose ``scene``
field is the exact description. Contents depend on the arguments alone, byte for byte.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from emu35.data.scenes.captions import Detail, Language, caption
from emu35.data.scenes.describe import Scene, Split, sample_scene
from emu35.data.scenes.render import render
from emu35.data.shards import atomic_file

BRIEF_SHARE = 0.5
"""Share of training captions that leave size and place open."""

CHINESE_SHARE = 0.2


def write_scenes(
    path: Path,
    *,
    split: Split,
    count: int,
    seed: int,
    resolution: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``count`` captioned pictures of ``split`` to the tar ``path``, whole or not at all.

    Held-out captions are always full (see :mod:`emu35.data.scenes.captions`). ``progress`` is
    called with the number of pictures written so far.

    Raises:
        DataError: the disk is full.
    """
    rng = random.Random(f"{seed}-{split}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        _fill_tar(
            stream,
            rng=rng,
            split=split,
            count=count,
            resolution=resolution,
            progress=progress or (lambda done: None),
        )


def _fill_tar(
    stream: BinaryIO,
    *,
    rng: random.Random,
    split: Split,
    count: int,
    resolution: int,
    progress: Callable[[int], None],
) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            scene = sample_scene(rng, split=split)
            language, text = sample_caption(scene, rng=rng, split=split)
            key = f"{number:09d}"
            picture = io.BytesIO()
            render(scene, resolution=resolution).save(picture, "PNG")
            record = {
                "key": key,
                "caption": text,
                "language": str(language),
                "width": resolution,
                "height": resolution,
                "status": "success",
                "scene": scene.to_json(),
            }
            _add(tar, name=f"{key}.png", data=picture.getvalue())
            _add(tar, name=f"{key}.txt", data=text.encode())
            _add(tar, name=f"{key}.json", data=json.dumps(record).encode())
            progress(number + 1)


def _add(tar: tarfile.TarFile, *, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def sample_caption(scene: Scene, *, rng: random.Random, split: Split) -> tuple[Language, str]:
    """A caption for ``scene``, with the language it is in."""
    language = Language.zh if rng.random() < CHINESE_SHARE else Language.en
    brief = split is Split.train and rng.random() < BRIEF_SHARE
    detail = Detail.brief if brief else Detail.full
    return language, caption(scene, rng=rng, language=language, detail=detail)


ENOUGH_DRAWS = 1000
"""After so many single objects that were all known, hardly any is left."""


def sample_prompts(*, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` held-out captions to generate from: ``id``, ``prompt``, ``language``, ``scene``.

    At least half of the scenes have a single object, as long as there are any that are not taken
    yet; no two have the same description.
    """
    rng = random.Random(f"{seed}-prompts")
    prompts: list[dict[str, Any]] = []
    seen: set[tuple[object, ...]] = set()
    taken = 0  # draws in a row that were known
    while len(prompts) < count:
        single = len(prompts) % 2 == 0 and taken < ENOUGH_DRAWS
        weights = (1.0,) if single else (0.3, 0.45, 0.25)
        scene = sample_scene(rng, split=Split.val, count_weights=weights)
        taken = taken + 1 if scene.objects in seen else 0
        if taken:
            continue
        seen.add(scene.objects)
        language, text = sample_caption(scene, rng=rng, split=Split.val)
        prompts.append(
            {
                "id": f"{len(prompts):04d}",
                "prompt": text,
                "language": str(language),
                "scene": scene.to_json(),
            }
        )
    return prompts
