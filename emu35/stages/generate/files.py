"""What generation leaves on disk."""

import io
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.data.story import Picture, Story, build_story, encode_story, read_picture
from emu35.inference.request import Generated
from emu35.stages.generate.earlier import DIALOGUE, PAGE, earlier_files
from emu35.stages.output import unwritable, write_output
from emu35.stages.view.page import write_page
from emu35.stages.view.sources import RESULTS, read_stories
from emu35.tokens.answer import read_answer
from emu35.tokens.document import Image, Special, Text
from emu35.tokens.template import Task
from emu35.vision.codec import ImageCodec, decode_grids
from emu35.vision.resize import to_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What an answer is the answer to; ``references`` are the PNG bytes of its images."""

    prompt: str
    task: Task
    seed: int
    id: str | None = None
    references: tuple[bytes, ...] = ()


class GeneratedFiles:
    """Writes answers below ``folder``: prompt, references, images and text of each, and a row of
    ``results.jsonl``; with ``story`` also the protobuf file. ``asked`` has an entry for every
    answer before it is written; ``writes`` are those of :data:`~emu35.stages.generate.earlier.PAGE`
    and :data:`~emu35.stages.generate.earlier.DIALOGUE` that will be written.

    :meth:`remove_earlier` comes first: files that an earlier call listed in the same
    ``results.jsonl`` go, so that nothing of it survives between the new ones. That holds wherever
    the earlier call was killed: a file is listed before it is written.

    Raises:
        ConfigError: the folder has files in the way that are not ours; none is touched.
        DataError: (from every method) naming a path that cannot be written, and why.
    """

    def __init__(
        self,
        *,
        folder: Path,
        codec: ImageCodec | None,
        expected: int,
        logprobs: bool = False,
        story: bool = True,
        writes: Collection[str] = (PAGE,),
    ) -> None:
        earlier_files(folder, writes=writes)
        self.folder = folder
        self.asked: dict[int, Asked] = {}
        self._codec = codec
        self._logprobs = logprobs
        self._story = story
        self._writes = writes
        self._rows: dict[int, dict[str, Any]] = {}
        self._drawn: defaultdict[int, list[str]] = defaultdict(list)  # images of unfinished answers
        self._references: dict[bytes, str] = {}
        self._shown: set[str] = set()  # references that are written
        # Three digits at least, and as many as all names need to sort in order.
        self._digits = max(3, len(str(expected - 1)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of all answers so far, in order of their prompts."""
        return [self._rows[index] for index in sorted(self._rows)]

    def remove_earlier(self) -> None:
        """Remove what an earlier call left in the folder.

        Raises:
            ConfigError: by now it has files in the way that are not ours; none is touched.
        """
        names = earlier_files(self.folder, writes=self._writes)
        try:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def add_image(self, index: int, codes_HW: NDArray[np.integer]) -> Path:
        """Write the next image of an answer that is not finished yet; its path."""
        drawn, asked = self._drawn[index], self.asked[index]
        name = self._image_name(index, len(drawn))
        drawn.append(name)
        # Stands only if the call is killed before the answer is finished.
        row = {
            "index": index,
            "prompt": asked.prompt,
            "finish": None,
            "images": list(drawn),
            "parts": [{"image": image} for image in drawn],
            "files": list(drawn),
        }
        self._append([row])
        (png,) = decode_images([codes_HW], codec=self._codec)
        self._put(name, content=png)
        return self.folder / name

    def write(self, answers: Sequence[Generated]) -> None:
        """List, decode and write ``answers``."""
        rows = {answer.index: self._row(answer) for answer in answers}
        self._append(rows.values())
        self._rows |= rows
        missing = [
            (answer.index, k, codes_HW)
            for answer in answers
            for k, codes_HW in enumerate(answer.document.images)
            if k >= len(self._drawn[answer.index])
        ]
        pictures = decode_images([codes_HW for _, _, codes_HW in missing], codec=self._codec)
        for (index, k, _), png in zip(missing, pictures, strict=True):
            self._put(self._image_name(index, k), content=png)
        for answer in answers:
            self._write_rest(answer)

    def forget(self, index: int) -> None:
        """Remove an answer: its row, and the files that no other answer has. With the last one go
        the page and the dialogue, which show nothing else."""
        row = self._rows.pop(index)
        self._drawn.pop(index, None)
        others = {name for other in self._rows.values() for name in other["files"]}
        self._put(RESULTS, content=_lines(self.rows))
        gone = set(row["files"]) - others
        for name in (*gone, *(() if self._rows else self._writes)):
            (self.folder / name).unlink(missing_ok=True)
        self._shown -= gone
        self._references = {png: n for png, n in self._references.items() if n not in gone}

    def finish(self) -> None:
        """Write the rows of all answers so far, in order of their prompts."""
        self._put(RESULTS, content=_lines(self.rows))

    def write_page(self) -> None:
        """Write the page of all rows that :meth:`finish` wrote, if there is any."""
        if self._rows:
            write_page(read_stories(self.folder), self.folder / PAGE)

    def write_dialogue(self, story: Story) -> None:
        """Write the turns of a dialogue as one story, and its page."""
        self._put(DIALOGUE, content=encode_story(story))
        write_page([story], self.folder / PAGE, title=story.question)

    def story(self, answer: Generated) -> Story:
        """A written answer as a story, its pictures read back."""
        asked = self.asked[answer.index]
        found = read_answer(answer.document)
        names = [self._image_name(answer.index, k) for k in range(len(found.images))]
        return build_story(
            found,
            question=asked.prompt,
            pictures=[self._picture(name) for name in names],
            references=[read_picture(png) for png in asked.references],
            story_id=asked.id or self._prefix(answer.index),
        )

    def _picture(self, name: str) -> Picture:
        return read_picture((self.folder / name).read_bytes())

    def _write_rest(self, answer: Generated) -> None:
        """Everything but the images."""
        asked, prefix = self.asked[answer.index], self._prefix(answer.index)
        content = asked.prompt.encode(errors="replace") + b"\n"
        self._put(f"{prefix}_prompt.txt", content=content)
        for png in asked.references:
            if (name := self._references[png]) not in self._shown:
                self._put(name, content=png)
                self._shown.add(name)
        if text := _text(answer):
            self._put(f"{prefix}_text.txt", content=text)
        if self._story:
            self._put(f"{prefix}_story.pb", content=encode_story(self.story(answer)))

    def _row(self, answer: Generated) -> dict[str, Any]:
        index, document, asked = answer.index, answer.document, self.asked[answer.index]
        prefix = self._prefix(index)
        images = [self._image_name(index, k) for k in range(len(document.images))]
        references = self._reference_names(index)
        files = [f"{prefix}_prompt.txt", *([f"{prefix}_text.txt"] if _text(answer) else [])]
        files += [f"{prefix}_story.pb"] if self._story else []
        row: dict[str, Any] = {
            "index": index,
            **({"id": asked.id} if asked.id is not None else {}),
            "prompt": asked.prompt,
            "task": asked.task.value,
            "seed": asked.seed,
            "finish": answer.finish.value,
            "ids": answer.ids,
            "references": references,
            "images": images,
            "sizes": [list(codes_HW.shape) for codes_HW in document.images],
            "parts": self._parts(answer),
            "problems": document.problems,
            "files": [*files, *references, *images],
        }
        if self._logprobs:
            row["logprobs"] = [token.logprob for token in answer.tokens]
            row["forced"] = [token.forced for token in answer.tokens]
            row["denoised"] = [token.denoised for token in answer.tokens]
        return row

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

    def _reference_names(self, index: int) -> list[str]:
        """Names of the references, those of an earlier answer where it had the same picture."""
        names: list[str] = []
        for k, png in enumerate(self.asked[index].references):
            several = f"_{k}" if len(self.asked[index].references) > 1 else ""
            name = f"{self._prefix(index)}_reference_image{several}.png"
            names.append(self._references.setdefault(png, name))
        return names

    def _prefix(self, index: int) -> str:
        return f"{index:0{self._digits}d}"

    def _image_name(self, index: int, k: int) -> str:
        return f"{self._prefix(index)}_{k:02d}_image.png"

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


def decode_images(grids: Sequence[NDArray[np.integer]], *, codec: ImageCodec | None) -> list[bytes]:
    """PNG bytes of every grid of codes [H, W]; grids of one size are decoded together. No codec is
    needed where there are none."""
    if not grids:
        return []
    assert codec is not None, "an answer has an image that its request did not permit"
    return [png_of(pixels_3HW) for pixels_3HW in decode_grids(codec, grids)]


def png_of(pixels_3HW: NDArray[np.floating]) -> bytes:
    """A PNG file of pixels [3, H, W] in [-1, 1]."""
    stream = io.BytesIO()
    to_image(pixels_3HW).save(stream, format="PNG")
    return stream.getvalue()


def _text(answer: Generated) -> bytes:
    """The texts of an answer as a file; empty where there is none."""
    text = "\n\n".join(part.strip() for part in answer.document.texts if part.strip())
    return text.encode() + b"\n" if text else b""


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
