"""The page: HTML with everything in it.

Articles are written first, to a temporary file, since the index above them needs their thumbnails
and nobody knows beforehand what can be shown.
"""

import base64
import html
import io
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from PIL import Image as PillowImage

from emu35.data.story import Segment, Story, StoryImage
from emu35.errors import DataError
from emu35.files import atomic_file
from emu35.stages.output import unwritable
from emu35.stages.view.shown import LoadedPicture, Shown, load_picture, picture_name

_STAMP = 200
"""Pictures of fewer pixels a side are shown enlarged."""

_THUMBNAIL = (336, 252)
_LISTED_PROBLEMS = 10

# Nothing may be requested and no script may run, whatever a story's text turns out to be.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class PageReport:
    """What is on a page, its size, and a line for everything that could not be shown."""

    stories: int
    pictures: int
    bytes: int
    problems: list[str]

    @property
    def counts(self) -> str:
        """Stories, pictures and problems, in words."""
        words = [
            _count(self.stories, "story", "stories"),
            _count(self.pictures, "picture", "pictures"),
        ]
        if self.problems:
            words.append(_count(len(self.problems), "problem", "problems"))
        return ", ".join(words)


def write_page(stories: Iterable[Shown | Story], path: Path, *, title: str = "") -> PageReport:
    """Write the page of ``stories`` to ``path``, whole or not at all.

    ``title`` is the heading; without one it is the name of the only story, or their number.

    Raises:
        DataError: not one story could be shown (``path`` is left as it was), or ``path`` cannot be
            written.
    """
    entries: list[_Entry] = []
    try:
        with atomic_file(path) as file, TemporaryFile(dir=path.absolute().parent) as spool:
            for number, item in enumerate(stories, start=1):
                shown = Shown(story=item) if isinstance(item, Story) else item
                entries.append(_Article(spool, shown=shown, number=number).write())
            report = _report(entries)
            if not report.stories:
                raise DataError(_nothing(report.problems))
            file.write(_head(entries, report=report, title=title).encode(errors="replace"))
            spool.seek(0)
            shutil.copyfileobj(spool, file)
            file.write(b"</main></body></html>\n")
            size = file.tell()
    except OSError as error:
        raise unwritable(path, error) from error
    return replace(report, bytes=size)


def _report(entries: Sequence["_Entry"]) -> PageReport:
    return PageReport(
        stories=sum(entry.shown for entry in entries),
        pictures=sum(entry.pictures for entry in entries),
        bytes=0,
        problems=[line for entry in entries for line in entry.problems],
    )


def _nothing(problems: Sequence[str]) -> str:
    more = len(problems) - _LISTED_PROBLEMS
    lines = [*problems[:_LISTED_PROBLEMS], *([f"... and {more} more"] if more > 0 else [])]
    return "\n  - ".join(["nothing could be shown", *lines])


@dataclass(slots=True)
class _Entry:
    """An article's place in the index."""

    number: int
    name: str
    asked: str
    problems: list[str]
    shown: bool
    pictures: int = 0
    thumbnail: str = ""


class _Article:
    """Writes one story, picture by picture."""

    def __init__(self, out: BinaryIO, *, shown: Shown, number: int) -> None:
        self._out = out
        self._shown = shown
        self._name = shown.name or f"story {number}"
        self._entry = _Entry(
            number=number,
            name=self._name,
            asked=shown.story.question.strip() if shown.story else "",
            problems=[f"{self._name}: {line}" for line in shown.problems],
            shown=shown.story is not None,
        )

    def write(self) -> _Entry:
        story = self._shown.story
        anchor = f"s{self._entry.number}"
        self._put(
            f'<article id="{anchor}"><h2><a href="#{anchor}">{_escape(self._name)}</a></h2>\n'
        )
        if self._shown.problems:
            lines = "".join(f"<li>{_escape(line)}</li>" for line in self._shown.problems)
            self._put(f'<ul class="problems">{lines}</ul>\n')
        if story is not None:
            self._story(story)
        self._put("</article>\n")
        return self._entry

    def _put(self, text: str) -> None:
        self._out.write(text.encode(errors="replace"))

    def _story(self, story: Story) -> None:
        if story.deprecated:
            reason = story.deprecate_reason or "no reason is given"
            self._put(f'<p class="missing">Marked as deprecated: {_escape(reason)}</p>\n')
        self._put(_text(story.question, tag="div", kind="question text"))
        self._put(_folded("Translation of the question", story.question_translate))
        if story.reference_images:
            self._put('<div class="references">\n')
            for number, image in enumerate(story.reference_images, start=1):
                self._image(image, name=f"reference {number}")
            self._put("</div>\n")
        self._put(_folded("Thoughts on the whole answer", story.summary))
        self._put(_folded("Thoughts, refined", story.refined_summary))
        self._put(_folded("Thoughts, translated", story.summary_translate))
        self._put(_folded("Thoughts, refined and translated", story.refined_summary_translate))
        images = 0
        for clip in story.clips:
            self._put(_text(clip.story))
            self._put(_text(clip.caption, kind="caption text"))
            for segment in clip.segments:
                self._segment(segment, first_image=images + 1)
                images += len(segment.images)
        if not any(segment.asr.strip() or segment.images for segment in story.segments):
            self._put('<p class="empty">This story has no text and no image.</p>\n')

    def _segment(self, segment: Segment, *, first_image: int) -> None:
        self._put('<section class="step">\n')
        self._put(_text(segment.asr))
        self._put(_folded("Translation", segment.asr_translate))
        self._put(_text(segment.caption, kind="caption text"))
        for number, image in enumerate(segment.images, start=first_image):
            self._image(image, name=f"image {number}")
        self._put("</section>\n")

    def _image(self, image: StoryImage, *, name: str) -> None:
        self._put("<figure>\n")
        try:
            loaded = load_picture(image, folder=self._shown.folder)
        except DataError as error:
            line = f"{picture_name(image, default=name)}: {error}"
            self._problem(line)
            self._put(f'<p class="missing">{_escape(line)}</p>\n')
        else:
            self._entry.pictures += 1
            self._entry.thumbnail = self._entry.thumbnail or _thumbnail(loaded.pixels, alt="")
            self._put(_inlined(loaded, alt=image.caption.strip() or name))
        captions = dict.fromkeys(c.strip() for c in (image.caption, image.detail_caption))
        caption = "\n".join(text for text in captions if text)
        self._put(_text(caption, tag="figcaption", kind="text"))
        self._put(_folded("Thoughts before this image", image.chain_of_thought))
        self._put(_folded("Thoughts, translated", image.cot_translate))
        self._put("</figure>\n")

    def _problem(self, line: str) -> None:
        """Report a line; on the page it stands in its place, elsewhere it needs a name."""
        self._entry.problems.append(f"{self._name}: {line}")


def _head(entries: Sequence[_Entry], *, report: PageReport, title: str) -> str:
    several = len(entries) > 1
    heading = title or (f"{len(entries)} stories" if several else entries[0].name)
    style = files("emu35.stages.view").joinpath("page.css").read_text(encoding="ascii")
    cards = "".join(_card(entry) for entry in entries) if several else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="generator" content="emu35 view">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_escape(heading)}</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body class="{"several" if several else "single"}">\n<main>\n'
        f'<h1 dir="auto">{_escape(heading)}</h1>\n<p class="counts">{report.counts}</p>\n'
        + (f'<ul class="index">\n{cards}</ul>\n' if several else "")
    )


def _card(entry: _Entry) -> str:
    picture = entry.thumbnail or '<span class="blank"></span>'
    # Three lines are shown; what follows would only make the page longer.
    asked = f'<span class="asked" dir="auto">{_escape(entry.asked[:300])}</span>'
    wrong = _count(len(entry.problems), "problem", "problems") if entry.problems else ""
    return (
        f'<li><a href="#s{entry.number}">{picture}<span class="label">'
        f'<span class="name">{_escape(entry.name)}</span>{asked}'
        + (f'<span class="wrong">{wrong}</span>' if wrong else "")
        + "</span></a></li>\n"
    )


def _inlined(loaded: LoadedPicture, *, alt: str) -> str:
    picture = loaded.picture
    return _img(picture.image_data, picture.format.name, size=loaded.pixels.size, alt=alt)


def _thumbnail(pixels: PillowImage.Image, *, alt: str) -> str:
    small = pixels.copy()
    small.thumbnail(_THUMBNAIL)
    stream = io.BytesIO()
    format = "PNG" if _is_stamp(small.size) else "JPEG"
    small.save(stream, format=format, quality=80)
    return _img(stream.getvalue(), format, size=small.size, alt=alt)


def _is_stamp(size: tuple[int, int]) -> bool:
    return max(size) < _STAMP


def _img(content: bytes, format: str, *, size: tuple[int, int], alt: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    stamp = ' class="stamp"' if _is_stamp(size) else ""
    return (
        f'<img src="data:image/{format.lower()};base64,{data}" alt="{_escape(alt)}" '
        f'width="{size[0]}" height="{size[1]}"{stamp}>\n'
    )


def _text(text: str, *, tag: str = "p", kind: str = "text") -> str:
    """An element of ``text``; nothing where there is none."""
    words = _escape(text.strip())
    return f'<{tag} class="{kind}" dir="auto">{words}</{tag}>\n' if words else ""


def _folded(label: str, text: str) -> str:
    """``text`` behind ``label``, opened by a click; nothing where there is none."""
    words = _text(text, tag="div")
    return f"<details><summary>{label}</summary>{words}</details>\n" if words else ""


def _escape(text: str) -> str:
    """``text`` for HTML; control characters, which HTML does not permit, are marked."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", html.escape(text))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
