"""Both kinds of tokenizer, and the golden values."""

import json
from pathlib import Path
from typing import Any

import pytest

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def released_config(table: Path) -> TokenizerConfig:
    return TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131072, table=str(table))


@pytest.fixture(scope="session")
def released(released_config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer of the release, all 282,926 ids."""
    return build_text_tokenizer(released_config)


@pytest.fixture(scope="session")
def byte_tokenizer() -> TextTokenizer:
    """256 bytes and 1000 codes."""
    return build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=1000))


@pytest.fixture(scope="session")
def golden_tokenizer() -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_pipeline() -> dict[str, Any]:
    return json.loads((GOLDEN / "pipeline.json").read_text(encoding="utf-8"))
