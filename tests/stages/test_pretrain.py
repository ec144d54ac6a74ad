"""Pretraining refuses codes that another image tokenizer made, before it trains on them."""

from pathlib import Path

import numpy as np
import pytest
from tiny_vision import write_tiny_ibq

from emu35.config import (
    LMConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SourceConfig,
    TokenDataConfig,
    TokenizerConfig,
    ValidationConfig,
)
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.errors import DataError
from emu35.stages import pretrain
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.codec import weights_digest

CODES = 64


def write_shards(folder: Path, *, tokenizer: Path | None, parts: list[Part]) -> Path:
    """Shards as ingestion leaves them: with the digest of what encoded their pictures."""
    meta = ShardMeta(
        source=folder.name,
        kind="bytes",
        n_text=256,
        codebook_size=CODES,
        vision=weights_digest(tokenizer) if tokenizer else None,
    )
    sequence = serialize(
        Document(parts), build_text_tokenizer(TokenizerConfig(codebook_size=CODES))
    )
    with ShardWriter(folder=folder, meta=meta) as writer:
        for number in range(4):
            writer.append(sequence, document_id=str(number))
    return folder


PICTURE: list[Part] = [Text("a picture"), Image(np.arange(4).reshape(2, 2))]


def config_of(
    *, sources: dict[str, Path], validation: dict[str, Path], vision: Path | None
) -> RunConfig:
    return RunConfig(
        model=LMConfig(
            num_layers=1,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=2,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=128,
        ),
        tokenizer=TokenizerConfig(codebook_size=CODES, vision=str(vision) if vision else None),
        data=TokenDataConfig(
            sequence_length=64,
            sources={name: SourceConfig(path=str(path)) for name, path in sources.items()},
            validation={
                name: ValidationConfig(path=str(path)) for name, path in validation.items()
            },
        ),
        stage=PretrainConfig(steps=1, global_batch_size=2, micro_batch_size=2),
        optim=OptimConfig(warmup_steps=0),
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two image tokenizers that differ in their weights only."""
    folder = tmp_path_factory.mktemp("tokenizers")
    mine = write_tiny_ibq(folder / "mine", codes=CODES)
    return mine, write_tiny_ibq(folder / "other", codes=CODES, seed=1)


def refusal(config: RunConfig, *, run_dir: Path) -> str:
    run_dir.mkdir()
    with pytest.raises(DataError) as caught:
        pretrain.run(config, run_dir=run_dir)
    assert list(run_dir.iterdir()) == []
    return str(caught.value)


def test_a_run_with_another_tokenizer_than_its_shards_is_refused(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    mine, other = tokenizers
    shards = write_shards(tmp_path / "shards", tokenizer=mine, parts=PICTURE)
    config = config_of(sources={"a": shards}, validation={}, vision=other)
    text = refusal(config, run_dir=tmp_path / "run")
    assert str(shards / "shards-000000.tar") in text
    assert f"tokenizer.vision={other}" in text
    assert weights_digest(mine)[:12] in text
    assert weights_digest(other)[:12] in text
    assert "ingest them again" in text


def test_validation_pictures_of_another_tokenizer_are_refused(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    mine, other = tokenizers
    train = write_shards(tmp_path / "train", tokenizer=mine, parts=PICTURE)
    held_out = write_shards(tmp_path / "held_out", tokenizer=other, parts=PICTURE)
    config = config_of(sources={"a": train}, validation={"v": held_out}, vision=None)
    text = refusal(config, run_dir=tmp_path / "run")
    assert "different image tokenizers" in text
    assert "held_out-000000.tar" in text


def test_a_tokenizer_that_is_not_there_is_named_before_training(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    shards = write_shards(tmp_path / "shards", tokenizer=tokenizers[0], parts=PICTURE)
    config = config_of(sources={"a": shards}, validation={}, vision=tmp_path / "nowhere")
    assert "nowhere holds no image tokenizer" in refusal(config, run_dir=tmp_path / "run")


def test_the_tokenizer_of_the_shards_trains_beside_text_of_any(
    tmp_path: Path, tokenizers: tuple[Path, Path]
) -> None:
    mine, other = tokenizers
    pictures = write_shards(tmp_path / "pictures", tokenizer=mine, parts=PICTURE)
    # Ingested with --vision, but without a picture: nothing in it depends on the tokenizer.
    text = write_shards(tmp_path / "text", tokenizer=other, parts=[Text("words")])
    config = config_of(
        sources={"pictures": pictures, "text": text}, validation={"v": pictures}, vision=mine
    )
    (tmp_path / "run").mkdir()
    assert pretrain.run(config, run_dir=tmp_path / "run").step == 1


def test_ranks_that_see_other_shards_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "a", tokenizer=None, parts=[Text("words")])
    config = config_of(sources={"a": shards}, validation={}, vision=None)
    # What the other rank would have said, had it left one shard out.
    monkeypatch.setattr(
        pretrain, "gather", lambda value: [value, {"a": ("another", ["a-000007.tar"])}]
    )
    with pytest.raises(DataError, match=r"rank 1 does not see .*damaged there: a-000007\.tar, on"):
        pretrain.run(config, run_dir=tmp_path / "run")
