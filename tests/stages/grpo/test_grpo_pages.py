"""The sample page shows every picture, score and reason; what a model wrote cannot break it."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu35.errors import DataError
from emu35.rewards.sample import Picture
from emu35.stages.grpo.pages import ShownAnswer, ShownGroup, page_of, sheet_of, write_pages
from emu35.stages.grpo.types import Group, Prompt, Scores


def _picture(level: int, *, side: int = 16) -> Picture:
    return np.full((side, side, 3), level, np.uint8)


def _shown(
    answers: list[ShownAnswer], scores: list[Scores], *, prompt: str = "two red discs"
) -> ShownGroup:
    task = Prompt(task="scenes", number=3, id="s3", record={})
    return ShownGroup(
        group=Group(serial=0, prompt=task, rollouts=(), scores=scores),
        prompt=prompt,
        answers=answers,
        references=[_picture(1)],
    )


def _scores(total: float | None, **changes: object) -> Scores:
    if total is None:
        return Scores(unscored={"judge": "it said <nothing> useful"})
    values: dict[str, object] = {"raw": {"scene": 0.25}, "mapped": {"scene": 3.25}, "total": total}
    return Scores(**{**values, **changes})  # type: ignore[arg-type]


THREE = _shown(
    [
        ShownAnswer(pictures=[_picture(20)], advantage=-0.5),
        ShownAnswer(texts=["no picture, sorry"], advantage=None),
        ShownAnswer(texts=["first", "then"], pictures=[_picture(90), _picture(95)], advantage=0.5),
    ],
    [_scores(2.5), _scores(None), _scores(9.5, clamped=frozenset({"scene"}))],
)


class _Page(HTMLParser):
    """Tags, pictures and visible words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.levels: list[int] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        source = dict(attrs).get("src")
        if tag == "img" and source:
            png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
            self.levels.append(int(np.asarray(Image.open(io.BytesIO(png)))[0, 0, 0]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_everything_the_best_first() -> None:
    page = _Page(page_of([THREE], title="run"))
    assert page.levels == [1, 90, 95, 20], "the prompt's picture, then answers by their score"
    words = " ".join(page.words)
    for wanted in (
        *("two red discs", "task scenes", "prompt 3 (s3)", "mean 6.00, 2.50 to 9.50"),
        *("9.50, advantage +0.500", "2.50, advantage -0.500", "unscored, advantage -"),
        *("scene", "0.25", "3.25", "it said <nothing> useful", "no picture, sorry"),
    ):
        assert wanted in words
    assert page.words.count("clamped") == 1


def test_texts_of_a_model_are_text() -> None:
    evil = (
        "<script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[31m \ud800 \u732b"
        + "x" * 9999
    )
    shown = _shown([ShownAnswer(texts=[evil])], [_scores(5.0)], prompt=evil)
    text = page_of([shown], title="<b>run</b>")
    text.encode("ascii")
    page = _Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("img") == 1, "the prompt's own picture"
    assert any("alert(1)" in words and "\u732b" in words for words in page.words)
    assert any("more characters" in words for words in page.words)
    assert not re.search("[\x00-\x08\x0e-\x1f]", text)


def test_nothing_is_requested_from_anywhere() -> None:
    text = page_of([THREE], title="run")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "url(" not in text


def test_the_sheet_holds_the_pictures_in_the_same_order() -> None:
    sheet = sheet_of([THREE, THREE])
    assert sheet is not None
    # Enlarged from 16 to 128 pixels, 8 apart, below a label of 16.
    pixels = np.asarray(sheet)
    for row in range(2):
        y = 8 + 16 + 64 + row * (16 + 128 + 8)
        found = [int(pixels[y, 8 + 64 + place * 136, 0]) for place in range(4)]
        assert found == [1, 90, 95, 20]


def test_pictures_of_any_size_fit_on_the_sheet() -> None:
    wide = np.zeros((300, 3000, 3), np.uint8)
    sheet = sheet_of([_shown([ShownAnswer(pictures=[wide, _picture(7, side=1)])], [_scores(5.0)])])
    assert sheet is not None
    assert sheet.width < 1000


def test_files_of_a_step(tmp_path: Path) -> None:
    page, picture = write_pages([THREE], folder=tmp_path / "samples", step=10, title="run")
    assert page.name == "step_00000010.html"
    assert "run, step 10" in page.read_text("ascii")
    assert Image.open(picture).size[0] > 500
    text_only = ShownGroup(
        group=Group(serial=0, prompt=THREE.group.prompt, rollouts=(), scores=[_scores(1.0)]),
        prompt="say something",
        answers=[ShownAnswer(texts=["no"])],
    )
    files = write_pages([text_only], folder=tmp_path / "samples", step=20, title="run")
    assert [path.suffix for path in files] == [".html"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*samples"):
        write_pages([THREE], folder=tmp_path / "samples", step=1, title="run")
