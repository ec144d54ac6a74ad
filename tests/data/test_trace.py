"""A row that is traced back holds the documents that training saw in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from shard_documents import CODEBOOK, WriteSource, random_documents
from test_loader import ROW, data_config, loader_of

from emu35.config.data import Overlong, Packing, TokenDataConfig
from emu35.data.batch import Batch
from emu35.data.opening import OpenPlan, open_plan
from emu35.data.trace import Position, Row, check_position, rows_of_step
from emu35.errors import DataError
from emu35.tokens.document import Text
from emu35.tokens.vocabulary import Vocabulary

VOCABULARY = Vocabulary(n_text=256, codebook_size=CODEBOOK)
BATCH, STEPS = 8, 6


@pytest.fixture
def data(write_source: WriteSource) -> TokenDataConfig:
    """Two sources, one of them with documents longer than a row."""
    return data_config(
        {
            "scenes": write_source("scenes", random_documents(60, seed=1), shard_bytes=30_000),
            "text": write_source("text", [[Text(f"{n} " * (9 + 7 * n))] for n in range(25)]),
        }
    )


def plan_of(data: TokenDataConfig) -> OpenPlan:
    return open_plan(data=data, vocabulary=VOCABULARY, seed=7, global_batch_size=BATCH)


def traced(data: TokenDataConfig, *, step: int, start: Position | None = None) -> list[Row]:
    return rows_of_step(
        plan_of(data),
        step=step,
        global_batch_size=BATCH,
        start=start or Position(),
        watch=lambda done: None,
    )


def tokens_of(row: Row) -> list[int]:
    """The row as its pieces say it is."""
    tokens = [VOCABULARY.pad] * ROW
    for piece in row.pieces:
        ids = piece.entry.source.words(piece.document)[0].tolist()
        tokens[piece.left : piece.right] = ids[piece.start : piece.end]
    return tokens


def seen_of(batches: Sequence[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("overlong", [Overlong.cut, Overlong.drop])
def test_every_row_of_every_step_is_what_one_rank_or_four_trained_on(
    data: TokenDataConfig, packing: Packing, overlong: Overlong
) -> None:
    data.packing, data.overlong = packing, overlong
    states: list[dict[str, Any]] = []
    seen: list[list[list[int]]] = []
    with loader_of(data, batch=BATCH) as loader:
        for _ in range(STEPS // 2):
            seen.append(seen_of(loader.next_step()))
            states.append(json.loads(json.dumps(loader.state_dict())))
    ranks = [loader_of(data, rank=rank, size=4, batch=BATCH) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(states[-1])
    for _ in range(STEPS // 2):
        seen.append([row for rank in ranks for row in seen_of(rank.next_step())])
        states.append(json.loads(json.dumps(ranks[0].state_dict())))
    for rank in ranks:
        rank.close()

    for step in range(1, STEPS + 1):
        rows = traced(data, step=step)
        assert [tokens_of(row) for row in rows] == seen[step - 1]
        assert [row.number for row in rows] == list(range(BATCH * (step - 1), BATCH * step))
        for saved in range(1, step):
            position = Position(step=saved, state=states[saved - 1])
            again = traced(data, step=step, start=position)
            assert [tokens_of(row) for row in again] == seen[step - 1]


def test_pieces_of_a_document_say_which_tokens_they_hold(data: TokenDataConfig) -> None:
    pieces = [
        piece for step in range(1, 9) for row in traced(data, step=step) for piece in row.pieces
    ]
    cut = [piece for piece in pieces if not piece.whole]
    assert cut
    for piece in cut:
        length = int(piece.entry.source.length[piece.document])
        assert 0 <= piece.start < piece.end <= length
        assert length > ROW
    assert all(piece.start == 0 for piece in pieces if piece.whole)


def test_a_column_belongs_to_one_document_or_to_padding(data: TokenDataConfig) -> None:
    for row in traced(data, step=2):
        for column in range(ROW):
            piece = row.piece_at(column)
            assert (piece is None) == (column >= row.tokens)
            if piece is not None:
                assert piece.left <= column < piece.right


def test_data_that_changed_are_refused_from_either_side(
    data: TokenDataConfig, write_source: WriteSource
) -> None:
    with loader_of(data, batch=BATCH) as loader:
        loader.next_step()
        position = Position(step=1, state=loader.state_dict())
    check_position(plan_of(data), position=position)
    for path in Path(data.sources["scenes"].path).iterdir():
        path.unlink()
    write_source("scenes", random_documents(60, seed=9), shard_bytes=30_000)
    with pytest.raises(DataError, match="shards of source 'scenes' changed"):
        traced(data, step=3, start=position)
    with pytest.raises(DataError, match="shards of source 'scenes' changed"):
        check_position(plan_of(data), position=position)


def test_comparing_with_a_later_position_moves_nothing(data: TokenDataConfig) -> None:
    with loader_of(data, batch=BATCH) as loader:
        first = seen_of(loader.next_step())
        loader.next_step()
        later = Position(step=2, state=loader.state_dict())
    plan = plan_of(data)
    check_position(plan, position=later)
    rows = rows_of_step(
        plan, step=1, global_batch_size=BATCH, start=Position(), watch=lambda done: None
    )
    assert [tokens_of(row) for row in rows] == first
