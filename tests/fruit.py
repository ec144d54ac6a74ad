"""Short sentences as token shards, to train tiny models on."""

from pathlib import Path

from emu35.config import TokenizerConfig
from emu35.data.ingest.options import IngestOptions
from emu35.data.readers.discover import TextUnit
from emu35.stages.data import ingest


def write_fruit(folder: Path, *, tokenizer: TokenizerConfig | None = None) -> Path:
    """Forty sentences in ``folder``, under ``tokenizer`` (bytes if None); returns their shards."""
    lines = (f"{i} apples and {i * i} pears are {i + i * i} pieces of fruit" for i in range(40))
    (folder / "fruit.txt").write_text("\n".join(lines) + "\n")
    ingest(
        IngestOptions(
            inputs=[folder / "fruit.txt"],
            out=folder / "shards",
            source="fruit",
            text_unit=TextUnit.lines,
            tokenizer=tokenizer or TokenizerConfig(),
        )
    )
    return folder / "shards"
