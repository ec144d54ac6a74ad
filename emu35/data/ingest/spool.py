"""Outcomes of an input on disk, between the worker that made them and the shards.

The first line is JSON and names the input's fingerprint. Each outcome is a line of JSON with all
that is small, followed by its items as the product packs them. The file appears under its name when
it is whole, and is a scratch file of one version of emu35: anything unexpected in it is a reason to
encode the input again.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from emu35.data.ingest.product import Item, Outcome
from emu35.data.readers.records import Reject
from emu35.data.shards import atomic_file

_FORMAT = 2


def write_spool(
    path: Path,
    *,
    fingerprint: str,
    outcomes: Iterable[Outcome[Item]],
    pack: Callable[[Item], bytes],
) -> None:
    """Write all outcomes of an input.

    Raises:
        DataError: when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        _write_line(file, {"format": _FORMAT, "fingerprint": fingerprint})
        for outcome in outcomes:
            items = [pack(item) for item in outcome.documents]
            head = {
                "offset": outcome.offset,
                "records": outcome.records,
                "items": [len(data) for data in items],
                "rejects": [asdict(reject) for reject in outcome.rejects],
            }
            _write_line(file, head)
            file.writelines(items)
        _write_line(file, {"end": True})


def has_spool(path: Path, *, fingerprint: str) -> bool:
    """Whether the outcomes of an input with this fingerprint are there."""
    try:
        with path.open("rb") as file:
            return json.loads(file.readline()) == {"format": _FORMAT, "fingerprint": fingerprint}
    except (OSError, ValueError):
        return False


def read_spool(path: Path, *, unpack: Callable[[bytes], Item]) -> Iterator[Outcome[Item]]:
    """The outcomes that :func:`write_spool` wrote."""
    with path.open("rb") as file:
        file.readline()
        while "end" not in (head := json.loads(file.readline())):
            yield Outcome(
                offset=head["offset"],
                records=head["records"],
                rejects=[Reject(**fields) for fields in head["rejects"]],
                documents=[unpack(file.read(size)) for size in head["items"]],
            )


def _write_line(file: IO[bytes], value: dict[str, Any]) -> None:
    file.write(json.dumps(value).encode() + b"\n")
