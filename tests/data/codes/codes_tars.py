"""Tokenizations of small pictures by a stand-in for the image tokenizer, and what came out."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from ingest_inputs import FACTOR, GreyLevels

from emu35.data.codes.options import TokenizeOptions
from emu35.data.codes.shards import CodesMeta
from emu35.data.codes.tokenize import TokenizeSummary, tokenize

META = CodesMeta(
    source="demo",
    tokenizer=GreyLevels.digest,
    dtype=GreyLevels.dtype,
    codebook_size=64,
    factor=FACTOR,
)


def tokenized(
    inputs: list[Path], out: Path, *, encoder: GreyLevels | None = None, **changes: Any
) -> TokenizeSummary:
    """Tokenize into ``out`` with a tokenizer that exists nowhere."""
    options = TokenizeOptions(
        inputs=inputs, out=out, source="demo", vision=out / "nowhere", **changes
    )
    return tokenize(options, encoder=encoder or GreyLevels(), meta=META)


def records_of(out: Path) -> list[tuple[dict[str, Any], Any]]:
    """JSON and codes of every record of all tars, read by nothing of ours."""
    found: list[tuple[dict[str, Any], Any]] = []
    for path in sorted(out.glob("*.tar")):
        data: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data[member.name] = file.read()
        for name in data:
            if name.endswith(".codes.npy"):
                facts = json.loads(data[name.replace(".codes.npy", ".json")])
                found.append((facts, np.load(io.BytesIO(data[name]))))
    return found


def results_of(out: Path) -> dict[str, bytes]:
    """Everything that is a result: the tars, the reports and the rejects."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
