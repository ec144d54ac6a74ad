"""Folders in the layout of the official viewer, read and written.

::

    000_question.txt            000_global_cot.txt
    000_reference_image.png     (several: 000_reference_image_0.png, _1.png ...)
    NNN_text.txt                the text of segment NNN, from 001; NNN_prompt.txt is the older name
    NNN_MM_image.png            its images, from 00        NNN_MM_image_cot.txt   and their thoughts
"""

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emu35.data.story import Clip, Picture, PictureFormat, Segment, Story, StoryImage
from emu35.errors import DataError
from emu35.stages.output import refuse_nonempty, unwritable, write_output
from emu35.stages.view.shown import Shown, load_picture, picture_name, read_inside

_PICTURE = r"\.(?:png|jpe?g|webp|bmp)"
_KINDS = {
    "question": re.compile(r"\d+_question\.txt"),
    "thought": re.compile(r"\d+_global_cot\.txt"),
    "reference": re.compile(rf"\d+_reference_image(?:_(\d+))?{_PICTURE}", re.IGNORECASE),
    "text": re.compile(r"(\d+)_(?:text|prompt)\.txt"),
    "image": re.compile(rf"(\d+)_(\d+)_image{_PICTURE}", re.IGNORECASE),
    "image_thought": re.compile(r"(\d+)_(\d+)_image_cot\.txt"),
}
_LARGEST_NUMBER = 10**9


@dataclass(slots=True)
class _Step:
    """What the files of one number hold; ``pictures`` maps an image's number to its files."""

    texts: list[str] = field(default_factory=list[str])
    pictures: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    thoughts: dict[int, list[str]] = field(default_factory=dict[int, list[str]])


def is_layout(files: Sequence[Path]) -> bool:
    """Whether any of ``files`` is named as the official viewer names them."""
    return any(_kind(path.name) for path in files)


def read_layout(folder: Path, *, files: Sequence[Path]) -> Shown:
    """The story of ``folder``, whose ``files`` are given in order.

    Files that are missing between others, have the number of another, or are no UTF-8, are named.
    """
    shown = Shown(story=Story(), name=folder.absolute().name, folder=folder)
    story = Story()
    steps: dict[int, _Step] = {}
    found: dict[str, list[str]] = {"question": [], "thought": []}
    for path in files:
        name, kind = path.name, _kind(path.name)
        if kind is None:
            continue
        if kind[0] in found:
            found[kind[0]] += _read_text(folder, name, problems=shown.problems)
        elif kind[0] == "reference":
            story.reference_images.append(StoryImage(image=Picture(image_path=name)))
        else:
            step = steps.setdefault(kind[1][0], _Step())
            if kind[0] == "text":
                step.texts += _read_text(folder, name, problems=shown.problems)
            elif kind[0] == "image":
                step.pictures.setdefault(kind[1][1], []).append(name)
            else:
                texts = _read_text(folder, name, problems=shown.problems)
                step.thoughts.setdefault(kind[1][1], []).extend(texts)
    for kind_name, texts in (*found.items(), *((f"text {n}", s.texts) for n, s in steps.items())):
        if len(texts) > 1:
            shown.problems.append(f"{len(texts)} files of {kind_name}; shown one after another")
    story.question = "\n\n".join(found["question"])
    story.summary = "\n\n".join(found["thought"])
    shown.problems += _gaps([0, *steps], name="{:03d}_text.txt")
    for number in sorted(steps):
        images = _images(steps[number], number=number, problems=shown.problems)
        segment = Segment(asr="\n\n".join(steps[number].texts), images=images)
        story.clips.append(Clip(clip_id=f"clip_{len(story.clips):04d}", segments=[segment]))
    shown.story = story
    return shown


def write_layout(shown: Shown, folder: Path) -> list[str]:
    """Write the story as the official viewer does, into ``folder``, which is made; every picture
    is a PNG there. Returns a line for each picture that could not be written.

    Raises:
        DataError: ``shown`` has no story, or a file cannot be written.
        ReleaseError: ``folder`` is not empty.
    """
    if (story := shown.story) is None:
        raise DataError(f"{shown.name} has no story to write: {'; '.join(shown.problems)}")
    refuse_nonempty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    problems: list[str] = []

    def put_text(name: str, text: str) -> None:
        write_output(folder / name, content=text.encode(errors="replace") + b"\n")

    def put_image(name: str, image: StoryImage) -> None:
        try:
            content = _png(image, folder=shown.folder)
        except DataError as error:
            problems.append(f"{picture_name(image, default=name)}: {error}")
        else:
            write_output(folder / name, content=content)

    put_text("000_question.txt", story.question)
    if story.summary:
        put_text("000_global_cot.txt", story.summary)
    several = len(story.reference_images) > 1
    for number, image in enumerate(story.reference_images):
        put_image(f"000_reference_image{f'_{number}' if several else ''}.png", image)
    for number, segment in enumerate(story.segments, start=1):
        put_text(f"{number:03d}_text.txt", segment.asr)
        for k, image in enumerate(segment.images):
            put_image(f"{number:03d}_{k:02d}_image.png", image)
            if image.chain_of_thought:
                put_text(f"{number:03d}_{k:02d}_image_cot.txt", image.chain_of_thought)
    return problems


def _kind(name: str) -> tuple[str, list[int]] | None:
    for kind, pattern in _KINDS.items():
        if match := pattern.fullmatch(name):
            numbers = [int(text) for text in match.groups() if text is not None]
            return (kind, numbers) if max(numbers, default=0) < _LARGEST_NUMBER else None
    return None


def _read_text(folder: Path, name: str, *, problems: list[str]) -> list[str]:
    """The text of a file, without its last line end; nothing where it cannot be read."""
    try:
        content = read_inside(folder, name)
    except DataError as error:
        problems.append(f"{name}: {error}")
        return []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{name} is not UTF-8 (byte {error.start}); the wrong bytes are marked")
        text = content.decode("utf-8-sig", errors="replace")
    return [text.replace("\r\n", "\n").removesuffix("\n")]


def _images(step: _Step, *, number: int, problems: list[str]) -> list[StoryImage]:
    images: list[StoryImage] = []
    numbers = sorted({*step.pictures, *step.thoughts})
    problems += _gaps([-1, *numbers], name=f"{number:03d}_{{:02d}}_image.png")
    for k in numbers:
        names = step.pictures.get(k, [f"{number:03d}_{k:02d}_image.png"])
        if len(names) > 1:
            problems.append(f"one image in {len(names)} files: {', '.join(names)}; all are shown")
        thought = "\n\n".join(step.thoughts.get(k, []))
        for name in names:
            image = StoryImage(image=Picture(image_path=name), chain_of_thought=thought)
            images.append(image)
            thought = ""
    return images


def _gaps(numbers: Sequence[int], *, name: str) -> list[str]:
    """What is missing between ``numbers``: the viewer counts without leaving any out."""
    lines: list[str] = []
    ordered = sorted(numbers)
    for before, after in itertools.pairwise(ordered):
        if after - before > 1:
            first, last = name.format(before + 1), name.format(after - 1)
            lines.append(f"missing: {first}" + (f" to {last}" if first != last else ""))
    return lines


def _png(image: StoryImage, *, folder: Path | None) -> bytes:
    loaded = load_picture(image, folder=folder)
    if loaded.picture.format is PictureFormat.PNG:
        return loaded.picture.image_data
    stream = io.BytesIO()
    loaded.pixels.save(stream, format="PNG")
    return stream.getvalue()
