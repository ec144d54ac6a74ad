"""A shown document is the one that was written, and can be found again in its tar."""

import json
import tarfile

import numpy as np
import pytest
from shard_documents import WriteSource, random_documents

from emu35.data.show import numbers_from, random_numbers, show_document, show_documents
from emu35.data.source import Source
from emu35.errors import DataError
from emu35.tokens.document import Document, Image, Special, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import TextTokenizer


def test_documents_come_back_with_their_name_in_the_tar(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    documents = random_documents(40, seed=5)
    folder = write_source("many", documents, shard_bytes=9000)
    source = Source(name="many", path=folder)
    shown = list(show_documents(source, tokenizer=tokenizer, numbers=range(40)))
    for number, (parts, found) in enumerate(zip(documents, shown, strict=True)):
        sequence = serialize(Document(parts), tokenizer)
        assert [part for part in found.parts if not isinstance(part, Special)] == parts
        np.testing.assert_array_equal(found.modality, sequence.modality)
        assert (found.id, found.number, found.tokens) == (str(number), number, len(sequence))
        with tarfile.open(folder / found.shard) as tar:
            tokens = tar.extractfile(f"{found.member}.tok")
            record = tar.extractfile(f"{found.member}.json")
            assert tokens is not None
            assert record is not None
            assert tokens.read() == sequence.tokens.tobytes()
            assert json.loads(record.read())["id"] == found.id


def test_text_has_specials_and_grids_in_their_places(
    write_source: WriteSource, tokenizer: TextTokenizer
) -> None:
    parts = [Text("a <|extra_203|> b"), Image(np.zeros((2, 3), int)), Text("c")]
    source = Source(name="one", path=write_source("one", [parts]))
    whole = show_document(source, number=0, tokenizer=tokenizer)
    assert whole.text() == "<|extra_203|>a <|extra_203|> b[image 2x3]c<|extra_204|>"
    # What the document says is text; what the tokenizer says is a special.
    assert [part for part in whole.parts if isinstance(part, Special)] == [
        Special("<|extra_203|>"),
        Special("<|extra_204|>"),
    ]
    piece = show_document(source, number=0, tokenizer=tokenizer, start=1, end=6)
    assert (piece.text(), piece.tokens, piece.length) == ("a <|e", 5, whole.tokens)
    broken = show_document(source, number=0, tokenizer=tokenizer, start=0, end=25)
    assert "[image without an end, " in broken.text()


def test_numbers_are_within_the_source(write_source: WriteSource) -> None:
    source = Source(name="a", path=write_source("a", random_documents(30, seed=1)))
    assert numbers_from(source, first=28, count=5) == [28, 29]
    for first in (-1, 30):
        with pytest.raises(DataError, match=f"no document {first}; it has 30"):
            numbers_from(source, first=first, count=1)
    drawn = random_numbers(source, count=10, seed=3)
    assert drawn == random_numbers(source, count=10, seed=3) == sorted(set(drawn))
    assert len(drawn) == 10
    assert set(drawn) <= set(range(30))
    assert drawn != random_numbers(source, count=10, seed=4)
    assert random_numbers(source, count=99, seed=0) == list(range(30))
