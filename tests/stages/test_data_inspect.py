"""``emu35 data inspect DIR``: what people see of documents."""

from pathlib import Path

import numpy as np
import pytest
from looked_at import CODES, Page, scenes, write_shards
from tiny_vision import write_tiny_ibq

from emu35.cli import main
from emu35.stages.data_page import code_map
from emu35.tokens.document import Image, Text
from emu35.vision.codec import decode_grids, load_codec, weights_digest
from emu35.vision.resize import to_image


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_ibq(tmp_path_factory.mktemp("vision"), codes=CODES)


def test_the_page_shows_text_as_text_and_codes_as_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = np.array([[1, 2, 1], [2, 1, 5]])
    hostile = Text("<script>alert('x')</script> & <|extra_203|> \x07 \N{SNOWMAN}")
    folder = write_shards(tmp_path / "odd", [[hostile, Image(codes)]])
    page = tmp_path / "page.html"
    assert main(["data", "inspect", str(folder), "--html", str(page)]) == 0
    assert "[image 2x3]" in capsys.readouterr().out
    shown = Page(page)
    assert "<script>alert('x')</script> & <|extra_203|> \N{REPLACEMENT CHARACTER} \N{SNOWMAN}" in (
        shown.text
    )
    assert "odd, document 0, id odd-0" in shown.text
    assert "odd-000000.tar, members 000000-000000" in shown.text
    assert "line: 0" in shown.text
    assert "--vision" in shown.text
    bar, picture = shown.pictures
    assert picture.size == (3, 2)
    pixels = np.asarray(picture)
    same = (pixels[:, :, None, None] == pixels).all(-1)
    np.testing.assert_array_equal(same, codes[:, :, None, None] == codes)
    # From the left: a control token, text, then the picture.
    colours = np.asarray(bar)[0]
    assert len({tuple(colour) for colour in colours.tolist()}) == 4
    assert (colours[1] == colours[20]).all()
    assert (colours[0] == colours[-1]).all()


def test_with_the_image_tokenizer_pictures_are_decoded(
    tmp_path: Path, vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = scenes(3)
    folder = write_shards(tmp_path / "s", documents, vision=weights_digest(vision))
    page = tmp_path / "page.html"
    words = ["data", "inspect", str(folder), "--html", str(page), "--vision", str(vision)]
    assert main([*words, "--first", "1", "--count", "1"]) == 0
    assert "did not encode" not in capsys.readouterr().out
    _, picture = Page(page).pictures
    image = documents[1][1]
    assert isinstance(image, Image)
    (pixels,) = decode_grids(load_codec(vision), [image.codes_HW])
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(to_image(pixels)))
    assert "caption 1" in Page(page).text
    assert "caption 0" not in Page(page).text


def test_another_image_tokenizer_is_said_or_refused(
    tmp_path: Path, vision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_shards(tmp_path / "s", scenes(2), vision="0" * 64))
    assert main(["data", "inspect", folder, "--vision", str(vision)]) == 0
    assert "did not encode these pictures (weights 000000000000 did)" in capsys.readouterr().out
    other = str(write_tiny_ibq(tmp_path / "other", codes=32))
    assert main(["data", "inspect", folder, "--vision", other]) == 2
    assert "has 32 codes, but the shards were made with 64" in capsys.readouterr().err


def test_random_documents_are_the_same_for_a_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_shards(tmp_path / "s", scenes(40)))

    def drawn(seed: int) -> list[str]:
        assert main(["data", "inspect", folder, "--random", str(seed), "--count", "4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("--- document")]

    assert len(drawn(1)) == 4
    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count 0 must be at least 1"),
        (["--random", "1", "--first", "2"], "--first and --random both choose documents"),
        (["--random", "-1"], "--random -1 must not be negative"),
        (["--images", "x"], "give its folder with --vision"),
        (["--first", "9"], "no document 9; it has 2, counted from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "s", scenes(2))
    assert main(["data", "inspect", str(folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_codes_next_to_each_other_have_colours_that_differ() -> None:
    colours = code_map(np.arange(256).reshape(16, 16)).reshape(-1, 3).astype(int)
    assert (np.abs(np.diff(colours, axis=0)).sum(axis=1) > 60).all()
    assert len({tuple(colour) for colour in colours.tolist()}) > 250
