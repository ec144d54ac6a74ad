"""Documents that were written wrong: their bytes are intact, what they say is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_documents import CODEBOOK
from test_validate_damage import validated

from emu35.data.shards import ShardMeta
from emu35.data.validate.problem import Check
from emu35.data.writer import ShardWriter
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import Modality, TokenSequence, modality_of, serialize
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)
PICTURE = Image(np.arange(6).reshape(2, 3))

Change = Callable[[list[int]], list[int]]


def written(
    folder: Path, *, sequence: TokenSequence, extra: dict[str, Any] | None = None
) -> list[tuple[Check, str]]:
    """What is found wrong with a folder whose second document this is."""
    meta = ShardMeta(source="odd", kind="bytes", n_text=256, codebook_size=CODEBOOK)
    fine = np.array([VOCABULARY.bos, 65, VOCABULARY.eos], np.uint32)
    with ShardWriter(folder=folder, meta=meta) as writer:
        sound = TokenSequence(fine, modality_of(fine, vocabulary=VOCABULARY))
        writer.append(sound, document_id="fine")
        writer.append(sequence, document_id="odd", extra=extra)
    _, problems = validated(folder)
    assert {problem.document for problem in problems} <= {1}
    return [(problem.check, problem.text) for problem in problems]


@pytest.fixture
def sequence(tokenizer: TextTokenizer) -> TokenSequence:
    return serialize(Document([Text("seen: "), PICTURE, Text("and gone")]), tokenizer)


def tokens_of(ids: list[int]) -> TokenSequence:
    tokens = np.array(ids, np.uint32)
    return TokenSequence(tokens, modality_of(tokens, vocabulary=VOCABULARY))


def test_what_the_writer_makes_is_sound(tmp_path: Path, sequence: TokenSequence) -> None:
    assert written(tmp_path, sequence=sequence, extra={"record": {"line": 3}}) == []


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_modality_that_its_id_has_not_is_reported(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ids = [VOCABULARY.bos, 65, *picture_ids(PICTURE), 66, VOCABULARY.eos]
    right = tokens_of(ids)
    at = data.draw(st.integers(0, len(ids) - 1))
    wrong = data.draw(st.sampled_from(sorted(set(Modality) - {Modality(right.modality[at])})))
    modality = right.modality.copy()
    modality[at] = wrong
    folder = tmp_path_factory.mktemp("wrong")
    found = written(folder, sequence=TokenSequence(right.tokens, modality))
    assert [check for check, _ in found] == [Check.modality]
    assert (
        f"token {at} has id {ids[at]}, which is {Modality(right.modality[at]).name}"
        in (found[0][1])
    )
    assert f"says {wrong.name}" in found[0][1]


def picture_ids(image: Image, *, said: str | None = None) -> list[int]:
    rows, columns = np.shape(image.codes_HW)
    ids = [VOCABULARY.boi, *(said or f"{rows}*{columns}").encode(), VOCABULARY.img]
    for number, row in enumerate(image.codes_HW.tolist()):
        ids += [VOCABULARY.eol] if number else []
        ids += [VOCABULARY.visual(code) for code in row]
    return [*ids, VOCABULARY.eoi]


def moved(ids: list[int]) -> list[int]:
    """As many codes and rows, one code in the wrong row."""
    at = ids.index(VOCABULARY.eol)
    return [*ids[: at - 1], ids[at], ids[at - 1], *ids[at + 1 :]]


def unmarked(ids: list[int]) -> list[int]:
    return [id for id in ids if id != VOCABULARY.img]


def strayed(ids: list[int]) -> list[int]:
    return [*ids, VOCABULARY.visual(5), VOCABULARY.visual(6)]


def missaid(ids: list[int]) -> list[int]:
    return [ids[0], *b"3*2", *ids[4:]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (moved, r"the picture at token 2 is ragged: its rows have [2, 4] codes"),
        (unmarked, "the picture at token 2 has 0 marks"),
        (strayed, "belongs into a picture and lies in none (and 1 more such tokens)"),
        (missaid, "the picture at token 2 has 2 rows of 3 codes and says another size"),
    ],
)
def test_pictures_that_are_none_are_reported(tmp_path: Path, change: Change, text: str) -> None:
    ids = [VOCABULARY.bos, 65, *change(picture_ids(PICTURE)), VOCABULARY.eos]
    found = written(tmp_path, sequence=tokens_of(ids))
    assert any(check is Check.pictures and text in said for check, said in found), found
    assert {check for check, _ in found} == {Check.pictures}


@pytest.mark.parametrize(
    ("extra", "check", "text"),
    [
        ({"tokens": 7}, Check.json, "its JSON says 7 tokens"),
        ({"id": None}, Check.json, "its JSON has no id"),
        ({"images": [[6, 20, 2, 3]]}, Check.pictures, "its index says that pictures span"),
        ({"images": []}, Check.pictures, "its JSON says that pictures lie at []"),
        ({"images": [[7, 20, 3, 2]]}, Check.pictures, "its JSON says that pictures lie at"),
    ],
)
def test_json_that_is_not_true_is_reported(
    tmp_path: Path, sequence: TokenSequence, extra: dict[str, Any], check: Check, text: str
) -> None:
    found = written(tmp_path, sequence=sequence, extra=extra)
    assert any(found_check is check and text in said for found_check, said in found), found
