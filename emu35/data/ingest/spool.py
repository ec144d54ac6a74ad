"""Outcomes of an input on disk, between the worker that made them and the shards.

The first line is JSON and names the input's fingerprint. Each outcome is a line of JSON with all
that is small, followed by the bytes of its sequences: ids (uint32) and modalities (run-length
coded, as in shards). The file appears under its name when it is whole, and is a scratch file of one
version of emu35: anything unexpected in it is a reason to encode the input again.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from emu35.data.ingest.documents import Outcome, Ready
from emu35.data.readers.records import Reject
from emu35.data.shards import atomic_file, decode_runs, encode_runs
from emu35.tokens.serialize import TokenSequence

_FORMAT = 1


def write_spool(path: Path, *, fingerprint: str, outcomes: Iterable[Outcome]) -> None:
    """Write all outcomes of an input.

    Raises:
        DataError: when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        _write_line(file, {"format": _FORMAT, "fingerprint": fingerprint})
        for outcome in outcomes:
            _write_outcome(file, outcome)
        _write_line(file, {"end": True})


def has_spool(path: Path, *, fingerprint: str) -> bool:
    """Whether the outcomes of an input with this fingerprint are there."""
    try:
        with path.open("rb") as file:
            return json.loads(file.readline()) == {"format": _FORMAT, "fingerprint": fingerprint}
    except (OSError, ValueError):
        return False


def read_spool(path: Path) -> Iterator[Outcome]:
    """The outcomes that :func:`write_spool` wrote."""
    with path.open("rb") as file:
        file.readline()
        while "end" not in (head := json.loads(file.readline())):
            yield Outcome(
                offset=head["offset"],
                records=head["records"],
                rejects=[Reject(**fields) for fields in head["rejects"]],
                documents=[
                    Ready(
                        id=document["id"],
                        hash=bytes.fromhex(document["hash"]),
                        sequences=tuple(_read_sequence(file, *s) for s in document["sizes"]),
                    )
                    for document in head["documents"]
                ],
            )


def _write_outcome(file: IO[bytes], outcome: Outcome) -> None:
    data: list[bytes] = []
    documents: list[dict[str, Any]] = []
    for ready in outcome.documents:
        sizes: list[tuple[int, int]] = []
        for sequence in ready.sequences:
            tokens = np.ascontiguousarray(sequence.tokens, dtype="<u4").tobytes()
            runs = encode_runs(np.asarray(sequence.modality, dtype=np.uint8)).astype("<u4")
            data += [tokens, runs.tobytes()]
            sizes.append((len(tokens), runs.nbytes))
        documents.append({"id": ready.id, "hash": ready.hash.hex(), "sizes": sizes})
    head = {
        "offset": outcome.offset,
        "records": outcome.records,
        "documents": documents,
        "rejects": [asdict(reject) for reject in outcome.rejects],
    }
    _write_line(file, head)
    file.writelines(data)


def _write_line(file: IO[bytes], value: dict[str, Any]) -> None:
    file.write(json.dumps(value).encode() + b"\n")


def _read_sequence(file: IO[bytes], tokens: int, runs: int) -> TokenSequence:
    return TokenSequence(
        np.frombuffer(file.read(tokens), "<u4"),
        decode_runs(np.frombuffer(file.read(runs), "<u4")),
    )
