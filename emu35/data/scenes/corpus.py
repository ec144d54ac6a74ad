"""Scenes as files: webdataset tars in the layout that img2dataset writes, and prompts to test with.

A tar holds, per picture, ``000000000.png``, ``.txt`` (the caption) and ``.json``, whose ``scene``
field is the exact description (``word`` of a picture of a word). Contents depend on the arguments
alone, byte for byte.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from emu35.data.scenes.captions import Detail, Language, caption, sample_language
from emu35.data.scenes.describe import Scene, Size, Split, sample_scene
from emu35.data.scenes.render import render
from emu35.data.scenes.words import Words, render_word, sample_word, word_caption
from emu35.data.shards import atomic_file
from emu35.errors import DataError

BRIEF_SHARE = 0.5
"""Share of training captions that leave size and place open."""


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
    _write_tar(
        path,
        (_drawn_scene(rng, split=split, resolution=resolution) for _ in range(count)),
        progress=progress,
    )


def write_words(
    path: Path,
    *,
    count: int,
    seed: int,
    resolution: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """The same with pictures of words (:mod:`emu35.data.scenes.words`), whose descriptions are
    under ``word``.

    Raises:
        DataError: the disk is full.
    """
    rng = random.Random(f"{seed}-words")
    _write_tar(
        path,
        (_drawn_word(rng, resolution=resolution) for _ in range(count)),
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """A picture, its caption, and what describes it under the key ``name``."""

    picture: Image.Image
    text: str
    language: Language
    name: str
    description: dict[str, Any]


def _drawn_scene(rng: random.Random, *, split: Split, resolution: int) -> _Drawn:
    scene = sample_scene(rng, split=split)
    language, text = sample_caption(scene, rng=rng, split=split)
    return _Drawn(
        picture=render(scene, resolution=resolution),
        text=text,
        language=language,
        name="scene",
        description=scene.to_json(),
    )


def _drawn_word(rng: random.Random, *, resolution: int) -> _Drawn:
    word = sample_word(rng, use=Words.pictured)
    language = sample_language(rng)
    return _Drawn(
        picture=render_word(word, resolution=resolution),
        text=word_caption(word, rng=rng, language=language),
        language=language,
        name="word",
        description=word.to_json(),
    )


def _write_tar(
    path: Path, drawn: Iterable[_Drawn], *, progress: Callable[[int], None] | None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(path) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, item in enumerate(drawn):
            key = f"{number:09d}"
            picture = io.BytesIO()
            item.picture.save(picture, "PNG")
            record = {
                "key": key,
                "caption": item.text,
                "language": str(item.language),
                "width": item.picture.width,
                "height": item.picture.height,
                "status": "success",
                item.name: item.description,
            }
            _add(tar, name=f"{key}.png", data=picture.getvalue())
            _add(tar, name=f"{key}.txt", data=item.text.encode())
            _add(tar, name=f"{key}.json", data=json.dumps(record).encode())
            if progress is not None:
                progress(number + 1)


def _add(tar: tarfile.TarFile, *, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def sample_caption(scene: Scene, *, rng: random.Random, split: Split) -> tuple[Language, str]:
    """A caption for ``scene``, with the language it is in."""
    language = sample_language(rng)
    brief = split is Split.train and rng.random() < BRIEF_SHARE
    detail = Detail.brief if brief else Detail.full
    return language, caption(scene, rng=rng, language=language, detail=detail)


ENOUGH_DRAWS = 1000
"""After so many draws that were all known, hardly anything else is left."""


def sample_prompts(*, count: int, seed: int, split: Split = Split.val) -> list[dict[str, Any]]:
    """``count`` captions of ``split`` to generate from: ``id``, ``prompt``, ``language``,
    ``scene``. They leave nothing open on either side, so that a picture can be judged by them.

    At least half of the scenes have a single object, as long as there are any that are not taken
    yet; no two have the same description.
    """
    # Reports of all versions draw the same held-out ones, and can be compared.
    rng = random.Random(f"{seed}-prompts" if split is Split.val else f"{seed}-{split}-prompts")
    prompts: list[dict[str, Any]] = []
    seen: set[tuple[object, ...]] = set()
    taken = 0  # draws in a row that were known
    while len(prompts) < count:
        single = len(prompts) % 2 == 0 and taken < ENOUGH_DRAWS
        weights = (1.0,) if single else (0.3, 0.45, 0.25)
        scene = sample_scene(rng, split=split, count_weights=weights)
        taken = taken + 1 if scene.objects in seen else 0
        if taken:
            continue
        seen.add(scene.objects)
        language = sample_language(rng)
        text = caption(scene, rng=rng, language=language, detail=Detail.full)
        prompts.append(
            {
                "id": f"{len(prompts):04d}",
                "prompt": text,
                "language": str(language),
                "scene": scene.to_json(),
            }
        )
    return prompts


def sample_word_prompts(*, count: int, seed: int, use: Words) -> list[dict[str, Any]]:
    """``count`` captions of words for ``use`` to generate from: ``id``, ``prompt``, ``language``,
    ``text`` (what a reader should find) and ``word`` as it is read best. No two are alike.

    Raises:
        DataError: there are not as many captions of different words.
    """
    rng = random.Random(f"{seed}-words-{use}-prompts")
    prompts: list[dict[str, Any]] = []
    seen: set[str] = set()
    known = 0  # draws in a row
    while len(prompts) < count:
        word = replace(sample_word(rng, use=use), size=Size.large)
        language = sample_language(rng)
        text = word_caption(word, rng=rng, language=language)
        known = known + 1 if text in seen else 0
        if known > ENOUGH_DRAWS:
            raise DataError(
                f"there are hardly more than {len(prompts)} captions of words that are {use}; ask "
                f"for fewer than {count}"
            )
        if known:
            continue
        seen.add(text)
        prompts.append(
            {
                "id": f"word-{len(prompts):04d}",
                "prompt": text,
                "language": str(language),
                "text": word.text,
                "word": word.to_json(),
            }
        )
    return prompts
