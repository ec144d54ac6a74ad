"""The demo's raw material besides scenes: real photographs with captions, and plain text."""

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from emu35.data.scenes.captions import Language, caption
from emu35.data.scenes.describe import Colour, Shape, Split, sample_scene

# File in the scikit-image wheel, caption in English, caption in Chinese. These are the coloured
# or plainly photographic ones among the files that the wheel itself carries: nothing is fetched.
PHOTOS = (
    (
        "astronaut.png",
        "a portrait of a smiling astronaut in an orange suit",
        "\u4e00\u4f4d\u8eab\u7a7f\u6a59\u8272\u822a\u5929\u670d\u7684\u5b87\u822a\u5458",
    ),
    (
        "chelsea.png",
        "the face of a ginger cat",
        "\u4e00\u53ea\u732b\u7684\u8138",
    ),
    (
        "coffee.png",
        "a cup of coffee on a saucer with a spoon",
        "\u4e00\u676f\u5496\u5561\u548c\u4e00\u628a\u52fa\u5b50",
    ),
    (
        "rocket.jpg",
        "a rocket standing on its launch pad at night",
        "\u53d1\u5c04\u53f0\u4e0a\u7684\u706b\u7bad",
    ),
    (
        "motorcycle_left.png",
        "a motorcycle in a cluttered garage",
        "\u8f66\u5e93\u91cc\u7684\u4e00\u8f86\u6469\u6258\u8f66",
    ),
    (
        "hubble_deep_field.jpg",
        "many distant galaxies in a dark sky",
        "\u6df1\u7a7a\u4e2d\u7684\u8bb8\u591a\u661f\u7cfb",
    ),
    (
        "camera.png",
        "a man with a camera on a tripod, in black and white",
        "\u4e00\u4e2a\u62ff\u7740\u76f8\u673a\u7684\u4eba",
    ),
    (
        "coins.png",
        "rows of old coins",
        "\u4e00\u6392\u6392\u53e4\u8001\u7684\u786c\u5e01",
    ),
    (
        "moon.png",
        "the cratered surface of the moon",
        "\u6708\u7403\u8868\u9762",
    ),
    ("grass.png", "grass seen from above", "\u8349\u5730"),
    ("brick.png", "a wall of bricks", "\u4e00\u9762\u7816\u5899"),
    ("gravel.png", "gravel on the ground", "\u5730\u4e0a\u7684\u788e\u77f3"),
)
"""(file name, English, Chinese)."""

ASPECTS = ((1, 1), (4, 3), (3, 4))


def write_photos(folder: Path, *, crops: int, seed: int) -> int:
    """Write ``crops`` crops of every photograph as PNG beside a ``.txt`` caption; returns how many.

    The first crop of a photograph is its whole middle, the others are random parts of it.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-image is not installed; the extra 'demo' brings it")
    source = Path(spec.origin).parent / "data"
    rng = random.Random(f"{seed}-photos")
    folder.mkdir(parents=True, exist_ok=True)
    for name, english, chinese in PHOTOS:
        with Image.open(source / name) as opened:
            image = opened.convert("RGB")
        for number in range(crops):
            stem = f"{Path(name).stem}-{number:02d}"
            crop = _crop(image, rng=rng, share=1.0 if number == 0 else rng.uniform(0.55, 1.0))
            crop.save(folder / f"{stem}.png")
            text = chinese if number % 4 == 3 else english
            (folder / f"{stem}.txt").write_text(f"{text}\n", encoding="utf-8")
    return len(PHOTOS) * crops


def _crop(image: Image.Image, *, rng: random.Random, share: float) -> Image.Image:
    """A part of ``image`` in one of the aspects, ``share`` of the largest that fits, at most 256
    pixels a side."""
    across, down = rng.choice(ASPECTS)
    unit = share * min(image.width / across, image.height / down)
    width, height = int(across * unit), int(down * unit)
    if share == 1.0:
        left, top = (image.width - width) // 2, (image.height - height) // 2
    else:
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height))
    crop.thumbnail((256, 256))
    return crop


def write_text(path: Path, *, lines: int, seed: int) -> None:
    """Write ``lines`` lines of text, one document each: a few plain sentences."""
    rng = random.Random(f"{seed}-text")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for _ in range(lines):
            sentences = list(_chinese(rng) if rng.random() < 0.3 else _english(rng))
            rng.shuffle(sentences)
            joiner = " " if sentences[0].isascii() else ""
            stream.write(joiner.join(sentences[: rng.randint(2, 4)]) + "\n")


def write_dialogues(path: Path, *, count: int, seed: int) -> None:
    """Write ``count`` task records of plain questions and answers, without pictures.

    A model of this size cannot tell apart tokens that it has never seen: their rows move as one.
    Adapters on a frozen base could then not learn to end a turn, so pretraining shows how turns
    are written.
    """
    rng = random.Random(f"{seed}-dialogues")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for _ in range(count):
            turns = [
                {"prompt": prompt, "answer": answer}
                for prompt, answer in rng.sample(list(_exchanges(rng)), rng.randint(1, 3))
            ]
            stream.write(json.dumps({"task": "chat", "turns": turns}) + "\n")


def _exchanges(rng: random.Random) -> Iterator[tuple[str, str]]:
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    yield f"What is {NUMBERS[a]} and {NUMBERS[b]}?", f"{NUMBERS[a + b].capitalize()}."
    known = rng.choice(list(SIDES))
    yield f"How many sides has a {known}?", f"{NUMBERS[SIDES[known]].capitalize()}."
    first, second = rng.sample(list(Colour), 2)
    yield f"Say {first}, then {second}.", f"{first}, {second}"
    yield f"Which is more, {NUMBERS[a]} or {NUMBERS[b]}?", f"{NUMBERS[max(a, b)].capitalize()}."


NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
SIDES = {Shape.square: 4, Shape.triangle: 3}
CHINESE_DIGITS = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d"


def _english(rng: random.Random) -> Iterator[str]:
    first, second = rng.sample(list(Colour), 2)
    shape, other = rng.sample(list(Shape), 2)
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    yield (
        f"{NUMBERS[a].capitalize()} {first} {shape}{'s' if a > 1 else ''} and {NUMBERS[b]} "
        f"{second} {other}{'s' if b > 1 else ''} make {NUMBERS[a + b]} shapes."
    )
    yield f"If the {first} {shape} is on the left, the {second} {other} is on its right."
    yield f"The {first} {shape} is not {second}, and it is not a {other}."
    known = rng.choice(list(SIDES))
    yield f"A {known} has {NUMBERS[SIDES[known]]} sides; a circle has none."
    larger, smaller = max(a, b), min(a, b)
    if larger > smaller:
        yield f"{NUMBERS[larger].capitalize()} is more than {NUMBERS[smaller]}."
    scene = sample_scene(rng, split=Split.train)
    seen = caption(scene, rng=rng, language=Language.en)
    yield f"In this picture we see the following. {seen[0].upper()}{seen[1:].rstrip('.')}."


def _chinese(rng: random.Random) -> Iterator[str]:
    a, b = rng.randint(1, 4), rng.randint(1, 5)
    plus, is_, stop = "\u52a0", "\u7b49\u4e8e", "\u3002"
    digits = CHINESE_DIGITS
    yield f"{digits[a]}{plus}{digits[b]}{is_}{digits[a + b]}{stop}"
    yield f"\u4e09\u89d2\u5f62\u6709\u4e09\u6761\u8fb9{stop}"
    yield f"\u6b63\u65b9\u5f62\u6709\u56db\u6761\u8fb9{stop}"
    yield f"\u5706\u5f62\u6ca1\u6709\u89d2{stop}"
    scene = sample_scene(rng, split=Split.train)
    yield caption(scene, rng=rng, language=Language.zh).rstrip(stop) + stop
