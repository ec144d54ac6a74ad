"""Read packed shards on four ranks, two tensor-parallel ones a replica; run under torchrun.
Usage: feed_worker.py SHARDS TRACE

Writes what every rank was handed in three steps, which of them opened a shard, and what each said
once the bytes of a shard had changed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emu35.checkpoint.agree import gather
from emu35.config import ParallelConfig, SourceConfig, TokenDataConfig
from emu35.data.batch import Batch
from emu35.data.loader import TokenLoader
from emu35.errors import DataError
from emu35.parallel.collectives import barrier, is_main
from emu35.parallel.mesh import Mesh, init_mesh, leave
from emu35.tokens.vocabulary import Vocabulary
from emu35.train.feed import Feed

LENGTH, CODEBOOK = 128, 64


def see_all(batch: Batch) -> Batch:
    """A stage that adds what not every batch has: intervals."""
    rows, width = batch.tokens.shape
    intervals = torch.arange(rows * width * 4).reshape(rows, width, 4)
    return Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__ if name != "intervals"},
        intervals=intervals,
    )


def open_loader(shards: Path, *, mesh: Mesh, reads: bool) -> TokenLoader:
    return TokenLoader(
        data=TokenDataConfig(
            sequence_length=LENGTH, sources={"a": SourceConfig(path=str(shards))}, prefetch_steps=0
        ),
        vocabulary=Vocabulary(n_text=256, codebook_size=CODEBOOK),
        seed=3,
        global_batch_size=4,
        micro_batch_size=1,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        prepare=see_all,
        reads=reads,
    )


def told(batch: Batch) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name in Batch.__slots__
        if (value := getattr(batch, name)) is not None
    }


def main(shards: Path, trace: Path) -> None:
    mesh = init_mesh(ParallelConfig(tp=2), seed=7)
    loader = open_loader(shards, mesh=mesh, reads=mesh.tp_rank == 0)
    plain = open_loader(shards, mesh=mesh, reads=True)
    feed = Feed(loader, mesh=mesh)
    steps = [[told(batch) for batch in feed.next_step()] for _ in range(3)]
    expected = [[told(batch) for batch in plain.next_step()] for _ in range(3)]
    assert loader.state_dict() == plain.state_dict()
    opened = sum(len(source._files) for source in loader.sources)
    barrier()
    if is_main():
        for tar in shards.glob("*.tar"):
            content = np.fromfile(tar, dtype=np.uint8)
            noise = np.random.default_rng(0).integers(0, 256, size=len(content), dtype=np.uint8)
            with tar.open("r+b") as file:  # in place: it is mapped
                file.write((content ^ noise).tobytes())
    barrier()
    said = "nothing"
    try:
        feed.next_step()
    except DataError as error:
        said = str(error)
    found = gather(
        {
            "dp": mesh.dp_rank,
            "tp": mesh.tp_rank,
            "equal": steps == expected,
            "rows": sum(len(step) for step in steps),
            "opened": opened,
            "said": said,
        }
    )
    if is_main():
        trace.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
