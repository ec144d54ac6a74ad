"""Pages of stories: what is on them, what is refused, and how a browser shows them."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage

from emu35.cli import main
from emu35.data.story import (
    Clip,
    Picture,
    Segment,
    Story,
    StoryImage,
    decode_story,
    encode_story,
    read_picture,
)
from emu35.errors import DataError, ReleaseError
from emu35.stages.view.layout import write_layout
from emu35.stages.view.page import write_page
from emu35.stages.view.shown import Shown
from emu35.stages.view.sources import read_stories

SECRET = b"the password is tulip"


def encoded(
    color: str = "teal", *, width: int = 40, height: int = 30, format: str = "PNG"
) -> bytes:
    stream = io.BytesIO()
    PillowImage.new("RGB", (width, height), color).save(stream, format=format)
    return stream.getvalue()


def pictured(color: str = "teal", *, thought: str = "", **size: Any) -> StoryImage:
    return StoryImage(image=read_picture(encoded(color, **size)), chain_of_thought=thought)


def told(*segments: Segment, question: str = "why?", **fields: Any) -> Story:
    clips = [
        Clip(clip_id=f"clip_{number:04d}", segments=[segment])
        for number, segment in enumerate(segments)
    ]
    return Story(question=question, clips=clips, **fields)


@pytest.fixture
def story() -> Story:
    return told(
        Segment(asr="first", images=[pictured("red", thought="red, since it burns")]),
        Segment(asr="second", images=[pictured("lime"), pictured("blue", format="JPEG")]),
        summary="a plan",
        reference_images=[pictured("white")],
    )


class Outline(HTMLParser):
    """A page in reading order: text with the classes around it, pictures by colour, links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.pictures: list[PillowImage.Image] = []
        self.targets: list[str] = []
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets += [
            str(given[name]) for name in ("src", "href", "srcset", "action") if name in given
        ]
        if tag == "img":
            content = base64.b64decode(str(given["src"]).split(",", 1)[1])
            picture = PillowImage.open(io.BytesIO(content)).convert("RGB")
            self.pictures.append(picture)
            self.lines.append(f"picture {picture.getpixel((5, 5))}")
        elif tag not in ("meta", "link"):
            self._inside.append(given.get("class") or tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self._inside:
            self.lines.append(f"{self._inside[-1]}: {data.strip()}")


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def shown_page(source: Path, tmp_path: Path) -> Outline:
    page = tmp_path / "page.html"
    assert main(["view", str(source), "--out", str(page)]) == 0
    return outline(page)


def test_a_story_in_reading_order(story: Story, tmp_path: Path, capsys):
    (tmp_path / "007.pb").write_bytes(encode_story(story))
    assert main(["view", str(tmp_path / "007.pb")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / '007.html'}: 1 story, 4 pictures\n"
    assert captured.err == ""
    page = outline(tmp_path / "007.html")
    assert page.lines == [
        *("title: 007.pb", "h1: 007.pb", "counts: 1 story, 4 pictures", "a: 007.pb"),
        *("question text: why?", "picture (255, 255, 255)"),
        *("summary: Thoughts on the whole answer", "text: a plan"),
        *("text: first", "picture (255, 0, 0)"),
        *("summary: Thoughts before this image", "text: red, since it burns"),
        *("text: second", "picture (0, 255, 0)", "picture (0, 0, 254)"),
    ]


def test_a_page_asks_for_nothing_and_runs_nothing(tmp_path: Path):
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)> \x00\x1b & \"'"
    image = pictured(thought=evil)
    image.caption = image.image_id = evil
    story = told(Segment(asr=evil, caption=evil, images=[image]), question=evil, summary=evil)
    missing = StoryImage(image=Picture(image_path=evil))
    story.reference_images.append(missing)
    path = tmp_path / "page.html"
    write_page([Shown(story=story, name=evil, problems=[evil]), Shown(story=story)], path)
    page = outline(path)
    assert all(target.startswith(("#s", "data:")) for target in page.targets)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<script|<img src=x|\x00|\x1b", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(", text)
    visible = "text: </p><script>alert(1)</script><img src=x onerror=alert(2)> \ufffd\ufffd & \"'"
    assert page.lines.count(visible) == 8  # the text, both thoughts and a caption, in each story


def test_a_folder_of_stories_has_an_index(story: Story, tmp_path: Path, capsys):
    for number in (2, 10, 1):
        named = replace(story, question=f"question {number}")
        (tmp_path / f"{number}.pb").write_bytes(encode_story(named))
    page = shown_page(tmp_path, tmp_path)
    order = [line for line in page.lines if line.startswith("asked")]
    assert order == ["asked: question 1", "asked: question 2", "asked: question 10"]
    questions = [line for line in page.lines if line.startswith("question")]
    assert questions == [f"question text: question {n}" for n in (1, 2, 10)]
    assert [target for target in page.targets if target.startswith("#")] == [
        *("#s1", "#s2", "#s3"),
        *("#s1", "#s2", "#s3"),
    ]
    assert len(page.pictures) == 3 + 3 * 4
    assert capsys.readouterr().out.endswith("3 stories, 12 pictures\n")


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(story: Story, tmp_path: Path, capsys):
    good = encode_story(story)
    (tmp_path / "0.pb").write_bytes(good)
    (tmp_path / "1.pb").write_bytes(good[:-7])
    (tmp_path / "2.pb").write_bytes(b"")
    (tmp_path / "3.pb").write_bytes(b"\xf2\x3e\x03abc")
    cut = told(Segment(images=[StoryImage(image=Picture(image_data=encoded()[:60]))]))
    (tmp_path / "4.pb").write_bytes(encode_story(cut))
    page = shown_page(tmp_path, tmp_path)
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["1.pb", "2.pb", "3.pb", "4.pb"]
    for said in ("was the file written whole", "no field of a story", "image 1: truncated image"):
        assert said in "\n".join(errors)
        assert said in "\n".join(page.lines)
    assert "counts: 2 stories, 4 pictures, 4 problems" in page.lines


def test_where_nothing_can_be_shown_nothing_is_written(tmp_path: Path, capsys):
    (tmp_path / "a.pb").write_bytes(b"\xff\xff")
    page = tmp_path / "a.html"
    page.write_text("an earlier page")
    assert main(["view", str(tmp_path / "a.pb")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emu35: nothing could be shown\n  - a.pb: 2 bytes are no emu3p5.story")
    assert page.read_text() == "an earlier page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.pb"]


@pytest.mark.parametrize("segments", [[], [Segment()], [Segment(asr=" \n")]])
def test_a_story_of_nothing_says_so(segments: list[Segment], tmp_path: Path):
    write_page([told(*segments)], tmp_path / "page.html")
    lines = outline(tmp_path / "page.html").lines
    assert lines[-1] == "empty: This story has no text and no image."
    assert "question text: why?" in lines


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pictures_of_every_format(format: str, tmp_path: Path):
    story = told(Segment(images=[pictured("black", format=format)]))
    report = write_page([story], tmp_path / "page.html")
    assert (report.pictures, report.problems) == (1, [])
    text = (tmp_path / "page.html").read_text()
    assert f"data:image/{format.lower()};base64," in text
    (picture,) = outline(tmp_path / "page.html").pictures
    assert picture.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (None, "image 1: it has neither bytes nor a path"),
        (Picture(image_data=b"GIF89a not shown"), "image 1: 16 bytes are no picture"),
        (Picture(image_data=encoded(format="GIF")), "it takes JPEG, PNG, WEBP, BMP"),
        (Picture(image_path="gone.png"), "gone.png: the file is missing"),
        (Picture(image_path="http://example.org/x.png"), "the file is missing"),
        (Picture(image_path="../secret.png"), "lies outside"),
        (Picture(image_path="{}/secret.png"), "lies outside"),
        (Picture(image_path="link.png"), "lies outside"),
        (Picture(image_path="/dev/zero"), "lies outside"),
        (Picture(image_path="pipe.png"), "it is no file"),
        (Picture(image_path="."), "it is no file"),
        (Picture(image_path="a\0b"), "it cannot be read: embedded null byte"),
    ],
)
def test_a_picture_that_is_not_there(picture: Picture | None, said: str, tmp_path: Path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded() + SECRET)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    if picture is not None:
        picture.image_path = picture.image_path.format(tmp_path)
    story = told(Segment(asr="text", images=[StoryImage(image=picture)]))
    (folder / "a.pb").write_bytes(encode_story(story))
    page = shown_page(folder / "a.pb", tmp_path)
    assert page.pictures == []
    assert "text: text" in page.lines
    (missing,) = (line for line in page.lines if line.startswith("missing: "))
    assert said in missing
    assert said in capsys.readouterr().err
    assert base64.b64encode(SECRET)[:12].decode() not in (tmp_path / "page.html").read_text()


def test_a_path_within_the_folder_is_followed(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded("red"))
    story = told(Segment(images=[StoryImage(image=Picture(image_path="pictures/a.png"))]))
    (tmp_path / "a.pb").write_bytes(encode_story(story))
    assert "picture (255, 0, 0)" in shown_page(tmp_path / "a.pb", tmp_path).lines
    with pytest.raises(DataError, match="nothing could be shown"):
        write_page([], tmp_path / "none.html")
    report = write_page([story], tmp_path / "page.html")  # without a folder, no file is read
    assert report.pictures == 0
    assert "no folder is given" in report.problems[0]


def generated_folder(folder: Path, rows: list[str]) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(f"{row}\n" for row in rows))
    for number, color in enumerate(("red", "lime")):
        (folder / f"000_{number:02d}_image.png").write_bytes(encoded(color))
    return folder


def test_a_folder_of_generate(tmp_path: Path, capsys):
    parts = [
        {"special": "<|extra_60|>"},
        {"text": "a plan"},
        {"special": "<|extra_61|>"},
        {"text": "first"},
        {"special": "<|extra_50|>"},
        {"text": "red, since it burns"},
        {"special": "<|extra_51|>"},
        {"image": "000_00_image.png"},
        {"text": "again"},
        {"image": "000_00_image.png"},
        {"image": "000_01_image.png"},
        {"special": "<|extra_204|>"},
    ]
    row = {
        "index": 0,
        "id": "crane",
        "prompt": "why?",
        "parts": parts,
        "problems": ["image without an end"],
    }
    outside = {"index": 2, "prompt": "x", "parts": [{"image": "../secret.png"}]}
    (tmp_path / "secret.png").write_bytes(encoded())
    folder = generated_folder(
        tmp_path / "out",
        [
            json.dumps(row),
            '{"index": 1, "prom',
            json.dumps(outside),
            "[1]",
            '{"prompt": "y", "parts": [{"sound": "a"}]}',
            "[" * 5000,
        ],
    )
    page = shown_page(folder, tmp_path)
    first = page.lines.index("a: prompt 0 (crane)")
    second = page.lines.index("a: results.jsonl line 2")
    assert page.lines[first:second] == [
        *("a: prompt 0 (crane)", "li: image without an end", "question text: why?"),
        *("summary: Thoughts on the whole answer", "text: a plan"),
        *("text: first", "picture (255, 0, 0)"),
        *("summary: Thoughts before this image", "text: red, since it burns"),
        *("text: again", "picture (255, 0, 0)", "picture (0, 255, 0)"),
    ]
    errors = capsys.readouterr().err
    assert "prompt 0 (crane): image without an end\n" in errors
    assert "results.jsonl line 2: not JSON" in errors
    assert "../secret.png: it lies outside" in errors
    assert "results.jsonl line 4: no row of emu35 generate" in errors
    assert "results.jsonl line 5: {'sound': 'a'} is neither" in errors
    assert "results.jsonl line 6: not JSON" in errors


def test_a_folder_that_generate_was_killed_in(tmp_path: Path, capsys):
    def row(finish: str | None, *names: str, index: int = 0) -> str:
        parts = [{"image": name} for name in names]
        return json.dumps({"index": index, "prompt": "why?", "finish": finish, "parts": parts})

    red, lime = "000_00_image.png", "000_01_image.png"
    folder = generated_folder(
        tmp_path / "out",
        [
            row(None, red),
            row(None, lime, index=1),
            row(None, red, lime),
            row("eos", red, lime, red),
            row(None, lime, "001_01_image.png", index=1),
            "{torn",
        ],
    )
    page = shown_page(folder, tmp_path)
    assert "counts: 2 stories, 4 pictures, 3 problems" in page.lines
    assert capsys.readouterr().err.splitlines()[:2] == [
        "prompt 1: generation was stopped before this answer was finished",
        "prompt 1: 001_01_image.png: the file is missing",
    ]


def test_an_empty_list_of_results(tmp_path: Path, capsys):
    folder = generated_folder(tmp_path / "out", [""])
    assert main(["view", str(folder)]) == 2
    assert "results.jsonl: it has no rows" in capsys.readouterr().err


def layout_folder(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_the_folder_of_the_official_viewer(tmp_path: Path, capsys):
    folder = layout_folder(
        tmp_path / "000",
        {
            "000_question.txt": "why?\n",
            "000_global_cot.txt": "a plan\n",
            "000_reference_image_0.png": encoded("white"),
            "000_reference_image_1.png": encoded("black"),
            "001_text.txt": "first\n",
            "001_00_image.png": encoded("red"),
            "001_00_image_cot.txt": "red, since it burns\n",
            "001_01_image.png": encoded("blue"),
            "002_prompt.txt": "second\n",
            "video.mp4": b"ignored",
        },
    )
    page = shown_page(folder, tmp_path)
    assert page.lines[page.lines.index("a: 000") + 1 :] == [
        *("question text: why?", "picture (255, 255, 255)", "picture (0, 0, 0)"),
        *("summary: Thoughts on the whole answer", "text: a plan"),
        *("text: first", "picture (255, 0, 0)"),
        *("summary: Thoughts before this image", "text: red, since it burns"),
        *("picture (0, 0, 255)", "text: second"),
    ]
    assert capsys.readouterr().err == ""


def test_a_viewer_folder_with_everything_wrong(tmp_path: Path, capsys):
    (tmp_path / "secret.txt").write_bytes(SECRET)
    folder = layout_folder(
        tmp_path / "000",
        {
            "000_question.txt": b"caf\xe9?\n",
            "001_text.txt": "first",
            "001_prompt.txt": "and older",
            "001_00_image.png": encoded("red"),
            "001_00_image.JPG": encoded("blue", format="JPEG"),
            "001_02_image.png": b"not a picture",
            "001_900000000_image.png": encoded("lime"),
            "003_00_image_cot.txt": "a thought without a picture",
            f"{'9' * 40}_text.txt": "ignored",
        },
    )
    (folder / "003_text.txt").symlink_to(tmp_path / "secret.txt")
    page = shown_page(folder, tmp_path)
    assert "question text: caf\ufffd?" in page.lines
    assert "picture (255, 0, 0)" in page.lines
    assert "picture (0, 0, 254)" in page.lines
    assert "text: a thought without a picture" in page.lines
    assert SECRET.decode() not in "".join(page.lines)
    errors = capsys.readouterr().err
    for said in (
        "000_question.txt is not UTF-8 (byte 3)",
        "2 files of text 1; shown one after another",
        "one image in 2 files: 001_00_image.JPG, 001_00_image.png; all are shown",
        "missing: 001_01_image.png\n",
        "missing: 001_03_image.png to 001_899999999_image.png",
        "missing: 002_text.txt",
        "001_02_image.png: 13 bytes are no picture",
        "003_00_image.png: the file is missing",
        "003_text.txt: it lies outside",
    ):
        assert said in errors


def test_the_viewer_folder_there_and_back(story: Story, tmp_path: Path, capsys):
    (tmp_path / "a.pb").write_bytes(encode_story(story))
    folder = tmp_path / "viewer"
    assert main(["view", str(tmp_path / "a.pb"), "--layout", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        *("000_global_cot.txt", "000_question.txt", "000_reference_image.png"),
        *("001_00_image.png", "001_00_image_cot.txt", "001_text.txt"),
        *("002_00_image.png", "002_01_image.png", "002_text.txt"),
    ]
    assert (folder / "002_01_image.png").read_bytes().startswith(b"\x89PNG")  # it was a JPEG
    (read,) = read_stories(folder)
    assert read.problems == []
    assert read.story is not None
    assert (read.story.question, read.story.summary) == (story.question, story.summary)
    assert [s.asr for s in read.story.segments] == [s.asr for s in story.segments]
    thoughts = [image.chain_of_thought for image in story.images]
    assert [image.chain_of_thought for image in read.story.images] == thoughts
    capsys.readouterr()
    assert main(["view", str(tmp_path / "a.pb"), "--layout", str(folder)]) == 2
    assert f"--layout {folder} is not empty" in capsys.readouterr().err
    with pytest.raises(ReleaseError, match="not empty"):
        write_layout(read, folder)


def test_several_viewer_folders(story: Story, tmp_path: Path):
    for name in ("a.pb", "b.pb"):
        (tmp_path / name).write_bytes(encode_story(story))
    gone = told(Segment(asr="x", images=[StoryImage(image=Picture(image_path="gone.png"))]))
    (tmp_path / "c.pb").write_bytes(encode_story(gone))
    assert main(["view", str(tmp_path), "--layout", str(tmp_path / "viewer")]) == 0
    assert sorted(path.name for path in (tmp_path / "viewer").iterdir()) == ["000", "001", "002"]
    third = tmp_path / "viewer" / "002"
    assert sorted(path.name for path in third.iterdir()) == ["000_question.txt", "001_text.txt"]
    assert write_layout(Shown(story=gone, folder=tmp_path), tmp_path / "again") == [
        "gone.png: the file is missing"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/no.pb"], "no.pb does not exist; name a .pb file, or a folder"),
        (["{}/empty"], "nothing to show in {}/empty"),
        (["{}/a.pb", "--out", "{}/page.png"], "page.png is no HTML file; its name must end in"),
        (["{}/a.pb", "--out", "{}/dir.html"], "dir.html is a folder; name a file in it"),
        (["{}/a.pb", "--out", "{}/no/page.html"], "its folder does not exist; make it"),
        (["{}/b.html"], "the page would replace {}/b.html itself; choose another --out"),
        (["{}/a.pb", "--layout", "{}/a.pb"], "a.pb is not empty"),
        (["{}/no", "--out", "{}/x.pb"], "2 problems"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys):
    content = encode_story(told(Segment(asr="x")))
    (tmp_path / "a.pb").write_bytes(content)
    (tmp_path / "b.html").write_bytes(content)
    for name in ("empty", "dir.html"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["view", *(word.format(tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emu35: ")
    assert message.format(tmp_path) in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot write .*page\.html: No such file or directory"):
        write_page([told(Segment(asr="x"))], tmp_path / "no" / "page.html")


def test_viewing_imports_no_heavy_package(story: Story, tmp_path: Path):
    (tmp_path / "a.pb").write_bytes(encode_story(story))
    code = (
        "import sys; from emu35.cli import main\n"
        f"assert main(['view', {str(tmp_path / 'a.pb')!r}]) == 0\n"
        "sys.exit(str({'torch', 'megatron', 'tiktoken'} & set(sys.modules) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0"


@pytest.mark.parametrize("megabytes", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_a_large_story_takes_memory_of_its_own_size(megabytes: int, tmp_path: Path):
    """The page is longer than the file by a third, and never held in memory."""
    stream = io.BytesIO()
    noise = PillowImage.frombytes("RGB", (640, 546), os.urandom(640 * 546 * 3))
    noise.save(stream, format="PNG", compress_level=0)
    image = StoryImage(image=read_picture(stream.getvalue()))
    path = tmp_path / "large.pb"
    path.write_bytes(encode_story(told(Segment(images=[image] * megabytes))))
    size = path.stat().st_size
    assert size > megabytes << 20
    code = (
        "import resource; from emu35.cli import main\n"
        "from emu35.stages.view.stage import view\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert main(['view', {str(path)!r}]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, grown = done.stdout.splitlines()
    assert said.endswith(f"1 story, {megabytes} pictures")
    assert int(grown) * 1024 < 3.2 * size + (48 << 20)
    assert ("slow to open" in done.stderr) == (megabytes > 100)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium", path="/usr/bin")
    if not found:
        pytest.skip("no chromium on PATH, to open the page in")
    return found


def browse(chromium: str, page: Path, *options: str, profile: Path) -> str:
    """What a fresh headless Chromium prints on ``page``; it is gone afterwards."""
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"),
        *(*options, page.as_uri()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBE = """<script>
addEventListener("load", () => {
  const pictures = [...document.images].map(image => image.naturalWidth);
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.probe = JSON.stringify({pictures, wide});
});
</script>"""


def test_a_browser_loads_every_picture(chromium: str, story: Story, tmp_path: Path):
    word = "w" * 400
    wide = told(
        *(
            Segment(asr=word, images=[pictured(format=format, width=width, height=60)])
            for format, width in (("PNG", 1500), ("JPEG", 300), ("WEBP", 301), ("BMP", 302))
        ),
        question=word,
    )
    page = tmp_path / "page.html"
    write_page([Shown(story=story, name=word), Shown(story=wide)], page)
    text = page.read_text()
    policy = re.search(r"<meta http-equiv[^>]*>\n", text)
    assert policy is not None
    # The page itself runs nothing, so the probe takes the place of its policy.
    (tmp_path / "probed.html").write_text(text.replace(policy[0], PROBE))
    options = ("--dump-dom", "--window-size=400,900")
    dom = browse(chromium, tmp_path / "probed.html", *options, profile=tmp_path / "profile")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found is not None, dom[:2000]
    probe = json.loads(found[1].replace("&quot;", '"'))
    assert probe["pictures"] == [40, 336, *[40] * 4, 1500, 300, 301, 302]
    assert probe["wide"] <= 0
    (tmp_path / "probed.html").write_text(text.replace(policy[0], policy[0] + PROBE))
    dom = browse(chromium, tmp_path / "probed.html", *options, profile=tmp_path / "profile")
    assert "addEventListener" in dom
    assert "data-probe" not in dom  # the policy holds: no script runs


def test_a_browser_paints_the_page(chromium: str, tmp_path: Path):
    page = tmp_path / "page.html"
    write_page([told(Segment(asr="so", images=[pictured("magenta", width=300, height=300)]))], page)
    shot = tmp_path / "shot.png"
    options = (f"--screenshot={shot}", "--window-size=800,700")
    browse(chromium, page, *options, profile=tmp_path / "profile")
    with PillowImage.open(shot) as picture:
        colors = {c: n for n, c in picture.convert("RGB").getcolors(1 << 20) or []}
    assert colors[255, 0, 255] > 80_000
    assert colors[251, 250, 248] > 200_000  # the ground: the style applies


def test_a_file_read_back_is_the_story_that_was_written(story: Story, tmp_path: Path):
    (tmp_path / "a.pb").write_bytes(encode_story(story))
    (shown,) = read_stories(tmp_path / "a.pb")
    assert shown.story == story == decode_story((tmp_path / "a.pb").read_bytes())
