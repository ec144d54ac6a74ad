"""A scene in words, English or Chinese, in several phrasings.

A *full* caption names shape, colour, size and place of every object, and therefore exactly one
entry of the train / held-out hash. A *brief* one groups and counts and leaves size and place open;
it is for training, and for wishes (:mod:`emu35.data.scenes.wishes`), only.
"""

import random
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

from emu35.data.scenes.describe import Background, Colour, Place, Scene, SceneObject, Shape, Size


class Language(StrEnum):
    """ISO 639-1 codes."""

    en = "en"
    zh = "zh"


CHINESE_SHARE = 0.2
"""Of everything that is said about scenes."""


def sample_language(rng: random.Random) -> Language:
    """English, or Chinese now and then."""
    return Language.zh if rng.random() < CHINESE_SHARE else Language.en


class Detail(StrEnum):
    """How much a caption says."""

    full = "full"
    brief = "brief"


EN_PLACE = {
    Place.top_left: "at the top left",
    Place.top: "at the top",
    Place.top_right: "at the top right",
    Place.left: "on the left",
    Place.centre: "in the centre",
    Place.right: "on the right",
    Place.bottom_left: "at the bottom left",
    Place.bottom: "at the bottom",
    Place.bottom_right: "at the bottom right",
}
EN_COUNT = {1: "one", 2: "two", 3: "three"}

# The Chinese words below are, in order, the enum members' own names.
_ZH_COLOURS = ["\u7ea2", "\u6a59", "\u9ec4", "\u7eff", "\u9752", "\u84dd", "\u7d2b", "\u7c89"]
_ZH_SHAPES = ["\u5706\u5f62", "\u6b63\u65b9\u5f62", "\u4e09\u89d2\u5f62", "\u4e94\u89d2\u661f"]
_ZH_PLACES = [
    "\u5de6\u4e0a\u89d2",
    "\u4e0a\u65b9",
    "\u53f3\u4e0a\u89d2",
    "\u5de6\u8fb9",
    "\u4e2d\u95f4",
    "\u53f3\u8fb9",
    "\u5de6\u4e0b\u89d2",
    "\u4e0b\u65b9",
    "\u53f3\u4e0b\u89d2",
]
ZH_COLOUR = dict(zip(Colour, _ZH_COLOURS, strict=True))
ZH_SHAPE = dict(zip(Shape, _ZH_SHAPES, strict=True))
ZH_PLACE = dict(zip(Place, _ZH_PLACES, strict=True))
ZH_SIZE = {Size.small: "\u5c0f", Size.medium: "\u4e2d\u7b49", Size.large: "\u5927"}
ZH_BACKGROUND = {Background.white: "\u767d\u8272", Background.black: "\u9ed1\u8272"}
ZH_COUNT = {1: "\u4e00", 2: "\u4e24", 3: "\u4e09"}
ZH_COMMA, ZH_STOP, ZH_COLON = "\uff0c", "\u3002", "\uff1a"


def caption(
    scene: Scene, *, rng: random.Random, language: Language, detail: Detail = Detail.full
) -> str:
    """One of the phrasings of ``scene``, chosen by ``rng``."""
    phrasings = {
        (Language.en, Detail.full): _EN_FULL,
        (Language.en, Detail.brief): _EN_BRIEF,
        (Language.zh, Detail.full): _ZH_FULL,
        (Language.zh, Detail.brief): _ZH_BRIEF,
    }[language, detail]
    return rng.choice(phrasings)(scene)


def join_english(parts: list[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _en_object(item: SceneObject) -> str:
    return _with_article(f"{item.size} {item.colour} {item.shape} {EN_PLACE[item.place]}")


def _en_list(scene: Scene) -> str:
    return join_english([_en_object(item) for item in scene.objects])


def _en_sentence(scene: Scene) -> str:
    verb = "is" if len(scene.objects) == 1 else "are"
    return f"There {verb} {_en_list(scene)}."


def _en_background(scene: Scene) -> str:
    return f"On a {scene.background} background: {_en_list(scene)}."


def _en_counted(scene: Scene) -> str:
    count = len(scene.objects)
    noun = "shape" if count == 1 else "shapes"
    return f"{EN_COUNT[count].capitalize()} {noun}: {_en_list(scene)}."


def _en_groups(scene: Scene) -> str:
    groups = Counter((item.colour, item.shape) for item in scene.objects)
    return join_english(
        [
            _with_article(f"{colour} {shape}")
            if count == 1
            else f"{EN_COUNT[count]} {colour} {shape}s"
            for (colour, shape), count in groups.items()
        ]
    )


def _en_groups_picture(scene: Scene) -> str:
    return f"A picture of {_en_groups(scene)}."


def _zh_object(item: SceneObject) -> str:
    one, of, colour = "\u4e00\u4e2a", "\u7684", "\u8272"
    return f"{one}{ZH_SIZE[item.size]}{of}{ZH_COLOUR[item.colour]}{colour}{ZH_SHAPE[item.shape]}"


def _zh_list(scene: Scene) -> str:
    has = "\u6709"
    return ZH_COMMA.join(f"{ZH_PLACE[item.place]}{has}{_zh_object(item)}" for item in scene.objects)


def _zh_sentence(scene: Scene) -> str:
    picture = "\u56fe\u4e2d"
    return f"{picture}{_zh_list(scene)}{ZH_STOP}"


def _zh_background(scene: Scene) -> str:
    background = "\u80cc\u666f"
    return f"{ZH_BACKGROUND[scene.background]}{background}{ZH_COLON}{_zh_list(scene)}{ZH_STOP}"


def _zh_counted(scene: Scene) -> str:
    things = "\u4e2a\u7269\u4f53"
    return f"{ZH_COUNT[len(scene.objects)]}{things}{ZH_COLON}{_zh_list(scene)}{ZH_STOP}"


def _zh_groups(scene: Scene) -> str:
    piece, colour_word, joint = "\u4e2a", "\u8272", "\u548c"
    groups = Counter((item.colour, item.shape) for item in scene.objects)
    return joint.join(
        f"{ZH_COUNT[count]}{piece}{ZH_COLOUR[colour]}{colour_word}{ZH_SHAPE[shape]}"
        for (colour, shape), count in groups.items()
    )


def _zh_groups_picture(scene: Scene) -> str:
    there_is = "\u753b\u9762\u91cc\u6709"
    return f"{there_is}{_zh_groups(scene)}{ZH_STOP}"


_Phrasings = tuple[Callable[[Scene], str], ...]
_EN_FULL: _Phrasings = (_en_list, _en_sentence, _en_background, _en_counted)
_EN_BRIEF: _Phrasings = (_en_groups, _en_groups_picture)
_ZH_FULL: _Phrasings = (_zh_list, _zh_sentence, _zh_background, _zh_counted)
_ZH_BRIEF: _Phrasings = (_zh_groups, _zh_groups_picture)
