"""Several workers: the same bytes for any number of them, and nothing lost when one dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ingest_inputs import (
    GreyLevels,
    documents_of,
    files_of,
    options_of,
    png,
    rejects_of,
    write_pairs,
)
from PIL import Image as Pictures

from emu35.data.ingest.documents import Ready
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import Dedup, PairOrder
from emu35.data.ingest.product import Outcome
from emu35.data.ingest.spool import has_spool, read_spool, write_spool
from emu35.data.ingest.token_shards import TokenShards
from emu35.data.readers.discover import TextUnit
from emu35.data.readers.records import Reject
from emu35.errors import DataError, LaunchError
from emu35.tokens.serialize import TokenSequence


class Deadly(GreyLevels):
    """Kills its process at a white picture, as the kernel does when memory runs out."""

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[npt.NDArray[np.integer[Any]]]:
        found = super().encode(pictures)
        if any(int(codes.max()) == 63 for codes in found):
            os.kill(os.getpid(), signal.SIGKILL)
        return found


class Waits(GreyLevels):
    """Tells that it began, by a file, and takes for ever."""

    def __init__(self, *, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[npt.NDArray[np.integer[Any]]]:
        (self.flag.parent / f"{self.flag.name}-{os.getpid()}").touch()
        time.sleep(600)
        return super().encode(pictures)


def inputs_of(folder: Path) -> list[Path]:
    """Four tars and a text, in which rejects and duplicates are spread."""
    paths = [
        write_pairs(folder / f"{n}.tar", count=4 + 2 * n, first=2 * n, bad=n % 2) for n in range(4)
    ]
    (folder / "x.txt").write_text("one\ntwo\none\n")
    return [*paths[:2], folder / "x.txt", *paths[2:]]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"dedup": Dedup.record},
    {"dedup": Dedup.picture, "order": PairOrder.both, "max_rejects": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "record", "both orders"])
def test_shards_and_rejects_are_the_same_for_any_number_of_workers(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    inputs = inputs_of(tmp_path)
    common: dict[str, Any] = {"shard_bytes": 9000, "text_unit": TextUnit.lines, **settings}
    outs = {workers: tmp_path / f"out{workers}" for workers in (1, 3)}
    found = {
        workers: ingest(options_of(inputs, out, workers=workers, **common), encoder=GreyLevels())
        for workers, out in outs.items()
    }
    assert files_of(outs[3]) == files_of(outs[1])
    assert len(files_of(outs[1])) > 8
    assert rejects_of(outs[3]) == rejects_of(outs[1])
    manifests = [(out / ".ingest" / "manifest.json").read_text() for out in outs.values()]
    assert manifests[0] == manifests[1]
    assert found[1].rejects == found[3].rejects
    assert list(outs[3].rglob("*.tmp")) == []
    assert list((outs[3] / ".ingest" / "encoded").iterdir()) == []


def test_a_worker_that_dies_leaves_what_is_finished_and_names_its_input(tmp_path: Path) -> None:
    paths = [write_pairs(tmp_path / f"{n}.tar", count=3, first=3 * n) for n in range(3)]
    white = tmp_path / "white"
    white.mkdir()
    (white / "a.png").write_bytes(png(width=8, height=8, grey=255))
    (white / "a.txt").write_text("white")
    inputs, out = [paths[0], white, *paths[1:]], tmp_path / "out"
    with pytest.raises(LaunchError, match=r"signal 9 while it read .*white; .*same command again"):
        ingest(options_of(inputs, out, workers=2), encoder=Deadly())
    assert multiprocessing.active_children() == []
    ingest(options_of(inputs, tmp_path / "clean"), encoder=GreyLevels())
    ingest(options_of(inputs, out, workers=2), encoder=GreyLevels())
    assert files_of(out) == files_of(tmp_path / "clean")


def test_what_workers_encoded_ahead_is_not_encoded_again(tmp_path: Path) -> None:
    white = tmp_path / "white"
    white.mkdir()
    (white / "a.png").write_bytes(png(width=8, height=8, grey=255))
    (white / "a.txt").write_text("white")
    later = write_pairs(tmp_path / "later.tar", count=3)
    out = tmp_path / "out"
    spool = out / ".ingest" / "encoded"
    # The first input waits for its end; the other one is finished by then.
    flag = tmp_path / "flag"

    class Interrupts(threading.Thread):
        def run(self) -> None:
            end = time.monotonic() + 300
            while time.monotonic() < end and len(list(spool.glob("*.jsonl"))) < 1:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

    Interrupts().start()
    with pytest.raises(KeyboardInterrupt):
        ingest(options_of([white, later], out, workers=2), encoder=WaitsAtWhite(flag=flag))
    assert files_of(out) == {}
    encoder = GreyLevels()
    ingest(options_of([white, later], out), encoder=encoder)
    assert sum(encoder.calls) == 1
    assert [name for name, _ in documents_of(out)] == ["a.png", "00000", "00001", "00002"]


class WaitsAtWhite(Waits):
    """As its base, for a white picture alone."""

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[npt.NDArray[np.integer[Any]]]:
        found = GreyLevels.encode(self, pictures)
        white = any(int(codes.max()) == 63 for codes in found)
        return super().encode(pictures) if white else found


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
if __name__ == "__main__":
    from ingest_inputs import options_of
    from test_ingest_workers import Waits
    from emu35.data.ingest.ingest import ingest
    inputs = [Path(p) for p in {inputs!r}]
    options = options_of(inputs, Path({out!r}), workers=2)
    ingest(options, encoder=Waits(flag=Path({flag!r})))
"""


def test_no_worker_outlives_a_killed_main_process(tmp_path: Path) -> None:
    inputs = [str(write_pairs(tmp_path / f"{n}.tar", count=2)) for n in range(2)]
    flag = tmp_path / "flag"
    text = SCRIPT.format(
        path=[str(Path(__file__).parent), *sys.path],
        inputs=inputs,
        out=str(tmp_path / "out"),
        flag=str(flag),
    )
    (tmp_path / "main.py").write_text(text)
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py")])

    def workers() -> list[int]:
        return [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("flag-*")]

    try:
        wait_until(lambda: len(workers()) == 2)
    finally:
        main.kill()
        main.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in workers()))


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        # A process that has ended and that nobody waits for is not alive.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_an_error_in_a_worker_is_the_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(width=16, height=8, grey=40))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"image": "p.png", "caption": "grey"}')
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(DataError, match="no image tokenizer was given"):
        ingest(options_of(inputs, tmp_path / "out", workers=2), encoder=None)


def test_a_spool_gives_back_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def sequence(length: int) -> TokenSequence:
        return TokenSequence(
            rng.integers(0, 2**31, length).astype(np.uint32),
            rng.integers(0, 4, length).astype(np.uint8),
        )

    product = TokenShards(options=options_of([], tmp_path), encoder=None)
    outcomes = [
        Outcome(
            offset=n,
            records=n % 3,
            documents=[
                Ready(id=f"\ud800 {n}", sequences=(sequence(n), sequence(n + 1)), hash=b"h" * k)
                for k in range(n % 3)
            ],
            rejects=[Reject(id="r", reason="because", detail="of this", offset=n)] * (n % 2),
        )
        for n in range(20)
    ]
    path = tmp_path / "x"
    assert not has_spool(path, fingerprint="f")
    write_spool(path, fingerprint="f", outcomes=outcomes, pack=product.pack)
    assert has_spool(path, fingerprint="f")
    assert not has_spool(path, fingerprint="g")
    for found, wanted in zip(read_spool(path, unpack=product.unpack), outcomes, strict=True):
        assert (found.offset, found.records) == (wanted.offset, wanted.records)
        assert found.rejects == wanted.rejects
        for one, other in zip(found.documents, wanted.documents, strict=True):
            assert (one.id, one.hash) == (other.id, other.hash)
            for left, right in zip(one.sequences, other.sequences, strict=True):
                np.testing.assert_array_equal(left.tokens, right.tokens)
                np.testing.assert_array_equal(left.modality, right.modality)
