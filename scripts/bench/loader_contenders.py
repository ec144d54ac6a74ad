"""What the benchmark of loaders compares: the same documents in the format natural to each, and a
generator for each that copies every document into rows and yields its token count."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROW = 32_768
N_TEXT, CODEBOOK = 151_643, 131_072
FILES = 20

Tokens = npt.NDArray[np.uint32]


class Rows:
    """Copies documents into rows, end to end; the same for every contender."""

    def __init__(self) -> None:
        self.tokens = np.empty(ROW, np.int64)
        self.document = np.empty(ROW, np.int64)
        self.used = 0
        self.number = 0

    def add(self, tokens: Tokens) -> int:
        place = 0
        while place < len(tokens):
            count = min(len(tokens) - place, ROW - self.used)
            self.tokens[self.used : self.used + count] = tokens[place : place + count]
            self.document[self.used : self.used + count] = self.number
            place += count
            self.used = (self.used + count) % ROW
        self.number += 1
        return len(tokens)


# Contenders: each yields the token count of every document it has copied.


def read_emu35(data: Path) -> Iterator[int]:
    from emu35.data.opening import open_source, plan_source
    from emu35.data.plan import Planner
    from emu35.tokens.vocabulary import Vocabulary

    vocabulary = Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK)
    entry = open_source(name="bench", path=data / "emu35", vocabulary=vocabulary, limit=ROW)
    planner = Planner(
        sources=[plan_source(entry, ratio=1.0)],
        sequence_length=ROW,
        # With one open bin the first documents out are exactly the first epoch.
        open_bins=1,
        shuffle_window=4096,
        seed=0,
    )
    rows = Rows()
    left = len(entry.items)
    while left:
        for sample in planner.take(8):
            items = np.array([item for _, item in sample.items[:left]], dtype=np.int64)
            left -= len(items)
            for tokens, _ in entry.source.read(entry.items.document[items]):
                yield rows.add(tokens)


def read_batches(data: Path) -> Iterator[int]:
    import torch

    from emu35.config import SourceConfig, TokenDataConfig
    from emu35.data.loader import TokenLoader
    from emu35.tokens.vocabulary import Vocabulary

    torch.set_num_threads(1)
    total = int(np.load(data / "offsets.npy")[-1])
    config = TokenDataConfig(
        sequence_length=ROW, sources={"bench": SourceConfig(path=str(data / "emu35"))}
    )
    with TokenLoader(
        data=config,
        vocabulary=Vocabulary(n_text=N_TEXT, codebook_size=CODEBOOK),
        seed=0,
        global_batch_size=8,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        # Rows are nearly full; counting their columns until the total is reached is one epoch.
        while total:
            for _ in loader.next_step():
                count = min(ROW, total)
                total -= count
                yield count
                if not total:
                    break


def read_webdataset(data: Path) -> Iterator[int]:
    webdataset: Any = import_module("webdataset")

    rows = Rows()
    shards = sorted(str(path) for path in (data / "webdataset").glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=FILES, seed=0, empty_check=False)
    for (tokens,) in dataset.shuffle(1000).decode().to_tuple("npy"):
        yield rows.add(tokens)


def read_litdata(data: Path) -> Iterator[int]:
    litdata: Any = import_module("litdata")

    rows = Rows()
    for sample in litdata.StreamingDataset(str(data / "litdata"), shuffle=True, seed=0):
        yield rows.add(sample["tokens"])


def read_numpy(data: Path) -> Iterator[int]:
    rows = Rows()
    offsets = np.load(data / "offsets.npy")
    tokens = np.memmap(data / "tokens.bin", np.uint32, "r")
    for document in np.random.default_rng(0).permutation(len(offsets) - 1):
        yield rows.add(tokens[offsets[document] : offsets[document + 1]])


def read_energon(data: Path) -> Iterator[int]:
    energon: Any = import_module("megatron.energon")

    @energon.edataclass
    class Tokenized(energon.Sample):
        tokens: Any

    @energon.stateless
    def cook(sample: dict[str, Any]) -> Any:
        # The member's array behind its header of 128 bytes; a decoder would cost more.
        tokens = np.frombuffer(sample["npy"], np.uint32, offset=128)
        return Tokenized(**energon.basic_sample_keys(sample), tokens=tokens)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[Any]) -> list[Any]:
            return samples

        def encode_batch(self, batch: list[Any]) -> list[Any]:
            return batch

    rows = Rows()
    dataset = energon.get_train_dataset(
        str(data / "webdataset"),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
        repeat=False,
    )
    for batch in energon.get_savable_loader(dataset):
        for sample in batch:
            yield rows.add(sample.tokens)


CONTENDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "emu35": read_emu35,
    "webdataset": read_webdataset,
    "litdata": read_litdata,
    "energon": read_energon,
    "numpy": read_numpy,
    "emu35 batches": read_batches,
}


# The same documents in each format.


def write_all(folder: Path, *, documents: int) -> int:
    """Write 200 to 4000 random tokens a document, in every format; the number of tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 4001, size=documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, N_TEXT, size=offsets[-1], dtype=np.uint32)
    np.save(folder / "offsets.npy", offsets)
    tokens.tofile(folder / "tokens.bin")
    parts = [tokens[a:b] for a, b in pairwise(offsets.tolist())]
    # energon reads what is written for webdataset.
    for write in (write_emu35, write_webdataset, write_litdata):
        write(folder, parts)
    return int(offsets[-1])


def write_emu35(folder: Path, parts: list[Tokens]) -> None:
    from emu35.data.shards import ShardMeta
    from emu35.data.writer import ShardWriter
    from emu35.tokens.serialize import TokenSequence

    meta = ShardMeta(source="bench", kind="emu35", n_text=N_TEXT, codebook_size=CODEBOOK)
    size = sum(part.nbytes for part in parts) // FILES
    with ShardWriter(folder=folder / "emu35", meta=meta, shard_bytes=size) as writer:
        for number, part in enumerate(parts):
            modality = np.zeros(len(part), np.uint8)
            writer.append(TokenSequence(part, modality), document_id=str(number))


def write_webdataset(folder: Path, parts: list[Tokens]) -> None:
    webdataset: Any = import_module("webdataset")

    (folder / "webdataset").mkdir()
    per_file = -(-len(parts) // FILES)
    pattern = str(folder / "webdataset" / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_file, verbose=0) as writer:
        for number, part in enumerate(parts):
            writer.write({"__key__": f"{number:08d}", "npy": part})
    command = [
        str(Path(sys.executable).with_name("energon")),
        "prepare",
        str(folder / "webdataset"),
    ]
    command += ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_litdata(folder: Path, parts: list[Tokens]) -> None:
    litdata: Any = import_module("litdata")

    target = folder / "litdata"
    shutil.rmtree(target, ignore_errors=True)
    litdata.optimize(
        fn=as_litdata_sample,
        inputs=[(str(folder), number) for number in range(len(parts))],
        output_dir=str(target),
        chunk_bytes="16MB",
        num_workers=1,
        verbose=False,
    )


def as_litdata_sample(entry: tuple[str, int]) -> dict[str, Tokens]:
    """Called in litdata's own worker, hence found by name and reading from the files."""
    folder, number = entry
    offsets = np.load(f"{folder}/offsets.npy", mmap_mode="r")
    tokens = np.memmap(f"{folder}/tokens.bin", np.uint32, "r")
    return {"tokens": np.array(tokens[offsets[number] : offsets[number + 1]])}
