"""What a person sees of an answer, event by event."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.inference.grammar import NextKind
from emu35.inference.request import Finish, Generated, Token, Update
from emu35.log.console import Console
from emu35.stages.generate.show import OneAnswer
from emu35.tokens.serialize import deserialize, image_tokens
from emu35.tokens.text import build_text_tokenizer

TOKENIZER = build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=8))
V = TOKENIZER.vocabulary


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(ids: Sequence[int], *, screen: io.StringIO) -> list[NDArray[np.integer]]:
    """Show ``ids`` token by token on ``screen``; the images that were to be saved."""
    saved: list[NDArray[np.integer]] = []

    def save(index: int, codes_HW: NDArray[np.integer]) -> Path:
        assert index == 3
        saved.append(codes_HW)
        return Path(f"{len(saved)}.png")

    console = Console(stream=screen)
    display = OneAnswer(console=console, out=screen, tokenizer=TOKENIZER, save=save)
    tokens = [Token(id=id, kind=NextKind.TEXT) for id in ids]
    for token in tokens[:-1]:
        display.update(Update(index=3, tokens=[token]))
        display.step()
    answer = Generated(
        index=3, tokens=tokens, document=deserialize(ids, TOKENIZER), finish=Finish.eos
    )
    display.update(Update(index=3, tokens=tokens[-1:], finished=answer))
    display.step()
    console.close()
    return saved


def test_text_images_and_thoughts_in_order() -> None:
    codes_HW = np.array([[1, 2], [3, 4]])
    ids = [
        *(V.bog, *b"a plan", V.eog),
        *(*b"One.", V.boc, *b"a dot", V.eoc, *image_tokens(codes_HW, TOKENIZER)),
        *(*b"Two.", *image_tokens(codes_HW + 1, TOKENIZER), V.ess, V.eos),
    ]
    screen = io.StringIO()
    saved = shown(ids, screen=screen)
    assert screen.getvalue() == (
        "[thinking] a plan\n[answer] One.\n[thinking] a dot\n"
        "image 1: 2*2 codes in 0:00 -> 1.png\n"
        "[answer] Two.\n"
        "image 2: 2*2 codes in 0:00 -> 2.png\n"
    )
    assert [np.array_equal(codes, codes_HW + k) for k, codes in enumerate(saved)] == [True] * 2


def test_a_terminal_shows_rows_and_ends_with_whole_lines(monkeypatch) -> None:
    monkeypatch.setattr("emu35.log.console._REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    codes_HW = np.arange(6).reshape(3, 2)
    screen = Terminal()
    shown([*b"Look.", *image_tokens(codes_HW, TOKENIZER)[:-2]], screen=screen)
    text = screen.getvalue()
    assert "image 1 (3*2)  row 0/3" in text
    assert "image 1 (3*2)  row 2/3  0:00 left" in text
    assert text.endswith("\r\x1b[Kimage without an end\n")


def test_a_model_cannot_steer_the_terminal() -> None:
    screen = io.StringIO()
    shown([*"\x1b]0;owned\x07 \x9b2J\ttab\r".encode(), V.eos], screen=screen)
    assert screen.getvalue() == "\\x1b]0;owned\\x07 \\x9b2J\ttab\\x0d\n"


def test_a_character_is_printed_when_it_is_whole() -> None:
    screen = io.StringIO()
    shown([*"\U0001f9a9 and \u6d77".encode(), V.eos], screen=screen)
    assert screen.getvalue() == "\U0001f9a9 and \u6d77\n"
