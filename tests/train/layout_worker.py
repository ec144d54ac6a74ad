"""Train a tiny model for a few steps on drawn documents; run alone or under torchrun.

Usage: layout_worker.py RESULT.json '{"tp": 2, "steps": 5, ...}'
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from emu35.config import (
    LMConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    PretrainConfig,
    RunConfig,
    TokenDataConfig,
)
from emu35.config.parallel import CPCommType
from emu35.data.batch import Batch
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.parallel.collectives import is_main
from emu35.parallel.mesh import Mesh, init_mesh, leave
from emu35.train.objective import weights_by_modality
from emu35.train.step import LMTask

LENGTH, ROWS, VOCABULARY = 48, 8, 301


class DrawnDocuments:
    """Global batches drawn from the step number. ``packing`` says how the same documents share
    rows: two a row with a padded tail, or one a row."""

    def __init__(self, *, mesh: Mesh, micro_batch_size: int, packed: bool) -> None:
        self.mesh, self.micro_batch_size, self.packed = mesh, micro_batch_size, packed
        self.step = 0

    def next_step(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        documents = []
        for _ in range(ROWS):
            first = int(torch.randint(4, 30, (1,), generator=generator))
            second = int(torch.randint(4, LENGTH - first + 1, (1,), generator=generator))
            for length in (first, second):
                ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
                documents.append((ids, (ids % 4).to(torch.uint8)))
        if self.packed:
            rows = [documents[2 * i : 2 * i + 2] for i in range(ROWS)]
        else:
            rows = [[document] for document in documents]
        share = len(rows) // self.mesh.dp_size
        own = rows[self.mesh.dp_rank * share : (self.mesh.dp_rank + 1) * share]
        size = self.micro_batch_size
        return [lay_out(own[i : i + size]) for i in range(0, len(own), size)]

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class HeldOut:
    """Three validation batches, a number that no pipeline divides, alike in every layout."""

    def __init__(self, *, mesh: Mesh) -> None:
        documents = DrawnDocuments(mesh=mesh, micro_batch_size=ROWS // mesh.dp_size, packed=True)
        documents.step = 1000
        self.batches = [documents.next_step()[0] for _ in range(3)]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def lay_out(rows: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> Batch:
    """Plain loops, so that the test does not lean on the code it tests."""
    shape = (len(rows), LENGTH)
    tokens, labels = torch.zeros(shape).long(), torch.zeros(shape).long()
    modality, valid = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.bool)
    positions, start = torch.zeros(shape).long(), torch.full(shape, LENGTH)
    for r, documents in enumerate(rows):
        column = 0
        for ids, codes in documents:
            for i in range(len(ids)):
                tokens[r, column + i], positions[r, column + i] = ids[i], i
                start[r, column + i] = column
                if i + 1 < len(ids):
                    labels[r, column + i], valid[r, column + i] = ids[i + 1], True
                    modality[r, column + i] = codes[i + 1]
            column += len(ids)
    return Batch(
        tokens=tokens,
        labels=labels,
        label_modality=modality,
        label_valid=valid,
        positions=positions,
        document_start=start,
        sample_ids=list(range(len(rows))),
    )


def make_task(spec: dict) -> LMTask:
    """The task of ``spec``; it lays out this process's world, again where it was laid out."""
    layout = ("tp", "sp", "pp", "vpp", "cp", "zero1")
    parallel = ParallelConfig(
        **{name: spec[name] for name in layout if name in spec},
        cp_comm_type=CPCommType(spec.get("cp_comm_type", "all_gather")),
    )
    model = LMConfig(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        hidden_dropout=spec.get("dropout", 0.0),
        attention_dropout=spec.get("dropout", 0.0),
    )
    stage = PretrainConfig(
        steps=20, precision=Precision(spec.get("precision", "fp32")), loss_chunk=40
    )
    config = RunConfig(
        model=model,
        data=TokenDataConfig(sequence_length=LENGTH),
        stage=stage,
        parallel=parallel,
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
    )
    mesh = init_mesh(parallel, seed=5)
    chunks = build_chunks(
        model,
        vocabulary_size=VOCABULARY,
        parallel=parallel,
        precision=stage.precision,
    )
    for chunk in chunks:
        initialize(chunk, seed=5, pad_id=0)
    documents = DrawnDocuments(
        mesh=mesh,
        micro_batch_size=spec.get("micro_batch_size", 2),
        packed=spec.get("packed", True),
    )
    return LMTask(
        config=config,
        mesh=mesh,
        chunks=chunks,
        loader=documents,  # type: ignore[arg-type]
        validation={"held_out": (HeldOut(mesh=mesh), weights_by_modality(stage.loss_weights))},  # type: ignore[dict-item]
        token_weights=weights_by_modality(stage.loss_weights),
    )


def make_steps(task: LMTask, *, count: int) -> list[dict[str, float]]:
    first = task.loader.state_dict()["step"] + 1
    return [dict(task.train_step(first + i)) for i in range(count)]


def sums(task: LMTask) -> dict[str, float]:
    """One number a parameter of this rank, enough to notice any difference."""
    return {
        f"{index}.{name}": parameter.detach().double().sum().item()
        for index, chunk in enumerate(task.chunks)
        for name, parameter in chunk.named_parameters()
    }


def main(result: Path, spec: dict) -> None:
    torch.set_num_threads(1)
    task = make_task(spec)
    metrics = make_steps(task, count=spec.get("steps", 5))
    validation = task.validate()
    if is_main():
        result.write_text(json.dumps({"metrics": metrics, "validation": validation}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
