"""Train a tiny model for a few steps on drawn documents; run alone or under torchrun.

Usage: layout_worker.py RESULT.json '{"tp": 2, "steps": 5, ...}'

or, as a rank of a pool that trains one layout after the other: layout_worker.py --pool, which reads
a specification a line; rank 0 answers with a line each.
"""

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from picture_documents import CODES, ROOM, HeldOutPictures, PictureDocuments
from spoil import observe

from emu35.checkpoint import sharded
from emu35.checkpoint.agree import gather
from emu35.config import (
    FP8,
    Adapter,
    DiDAConfig,
    EngineConfig,
    FP8Recipe,
    LayerSpec,
    LMConfig,
    LMStageConfig,
    LoRAConfig,
    LoRATarget,
    OptimConfig,
    ParallelConfig,
    PathConfig,
    PathKind,
    Precision,
    PretrainConfig,
    Recompute,
    RecomputeModule,
    RunConfig,
    TokenDataConfig,
    TokenizerConfig,
)
from emu35.config.parallel import CPCommType
from emu35.config.stage import adapts_noisy_only
from emu35.data.batch import Batch
from emu35.model.attention.support import MaskKind
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.model.lora import train_adapters
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import barrier, is_main
from emu35.parallel.mesh import Mesh, init_mesh, leave
from emu35.stages.dida import dida_objective
from emu35.tokens.vocabulary import vocabulary_of
from emu35.train.held_out import HeldOut
from emu35.train.objective import Term, mask_of, weights_by_modality
from emu35.train.step import LMTask

LENGTH, ROWS, VOCABULARY = 48, 8, 301
SOURCES = ("images", "stories", "text")
"""Documents belong to them by their length."""
PR_SET_PDEATHSIG = 1


Document = tuple[torch.Tensor, torch.Tensor]
"""Token ids and the modality of each."""


class DrawnDocuments:
    """Global batches drawn from the step number. ``packing`` says how the same documents share
    rows: two a row with a padded tail, or one a row. ``lengths``: the documents of every row,
    instead of two drawn ones."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        micro_batch_size: int,
        packed: bool,
        lengths: list[list[int]] | None = None,
    ) -> None:
        self.mesh, self.micro_batch_size, self.packed = mesh, micro_batch_size, packed
        self.lengths = lengths
        self.step = 0

    def next_step(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        rows = [
            [draw_document(length, generator) for length in lengths]
            for lengths in self.lengths or [draw_pair(generator) for _ in range(ROWS)]
        ]
        if not self.packed:
            rows = [[document] for row in rows for document in row]
        share = self.micro_batch_size * self.mesh.dp_size
        rows += [[] for _ in range(-len(rows) % share)]
        own = len(rows) // self.mesh.dp_size
        rows = rows[self.mesh.dp_rank * own : (self.mesh.dp_rank + 1) * own]
        size = self.micro_batch_size
        return [lay_out(rows[i : i + size]) for i in range(0, len(rows), size)]

    def counts(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def draw_pair(generator: torch.Generator) -> list[int]:
    first = int(torch.randint(4, 30, (1,), generator=generator))
    return [first, int(torch.randint(4, LENGTH - first + 1, (1,), generator=generator))]


def draw_document(length: int, generator: torch.Generator) -> Document:
    ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
    return ids, (ids % 4).to(torch.uint8)


class DrawnHeldOut:
    """Three validation batches, a number that no pipeline divides, alike in every layout."""

    def __init__(self, *, mesh: Mesh) -> None:
        documents = DrawnDocuments(mesh=mesh, micro_batch_size=ROWS // mesh.dp_size, packed=True)
        documents.step = 1000
        self.batches = [documents.next_step()[0] for _ in range(3)]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def lay_out(rows: list[list[Document]]) -> Batch:
    """Plain loops, so that the test does not lean on the code it tests."""
    shape = (len(rows), LENGTH)
    tokens, labels = torch.zeros(shape).long(), torch.zeros(shape).long()
    modality, valid = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.bool)
    positions, start = torch.zeros(shape).long(), torch.full(shape, LENGTH)
    source = torch.zeros(shape, dtype=torch.int16)
    for r, documents in enumerate(rows):
        column = 0
        for ids, codes in documents:
            source[r, column : column + len(ids) - 1] = len(ids) % len(SOURCES)
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
        label_source=source,
        positions=positions,
        document_start=start,
        sample_ids=list(range(len(rows))),
    )


def with_spans(batch: Batch) -> AttentionMask:
    """Causal, but the tokens 3 to 8 of every document see each other both ways."""
    span_end_BS = torch.zeros_like(batch.tokens)
    for r, starts in enumerate(batch.document_start.tolist()):
        for start in sorted({start for start in starts if start < LENGTH}):
            end = start + starts.count(start)
            span_end_BS[r, start + 3 : min(start + 9, end)] = min(start + 9, end)
    return AttentionMask.causal(batch.document_start, span_end_BS=span_end_BS)


LAYOUT = ("tp", "sp", "pp", "vpp", "cp", "zero1", "pp_layers")


def configure(spec: dict) -> RunConfig:
    return RunConfig(
        model=LMConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=8,
            num_kv_heads=4,
            head_dim=16,
            max_position_embeddings=LENGTH,
            hidden_dropout=spec.get("dropout", 0.0),
            attention_dropout=spec.get("dropout", 0.0),
        ),
        tokenizer=TokenizerConfig(codebook_size=CODES),
        data=TokenDataConfig(sequence_length=LENGTH),
        stage=stage_of(spec),
        parallel=ParallelConfig(
            **{name: spec[name] for name in LAYOUT if name in spec},
            cp_comm_type=CPCommType(spec.get("cp_comm_type", "all_gather")),
        ),
        engine=engine(**spec.get("engine", {})),
        # Adam divides each gradient by its own size, so that the rounding of one near zero becomes
        # a whole update; a large eps keeps equal what is equal.
        optim=OptimConfig(
            **{
                "lr": 1e-2,
                "warmup_steps": 2,
                "eps": 1e-4,
                "weight_decay": spec.get("weight_decay", 0.1),
                **spec.get("optim", {}),
            }
        ),
    )


def stage_of(spec: dict) -> LMStageConfig:
    common: dict[str, Any] = {
        "steps": 20,
        "precision": Precision(spec.get("precision", "fp32")),
        "loss_chunk": 40,
    }
    if "dida" not in spec:
        return PretrainConfig(**common)
    if "lora" in spec:
        common |= {"adapter": Adapter.lora_noisy_only, "lora": lora(spec["lora"])}
    return DiDAConfig(
        **common,
        path=PathConfig(kind=PathKind(spec["dida"])),
        time_shift_codes=4,
        noisy_length=ROOM,
        responses_only=False,
    )


ENUMS = {"recompute": Recompute, "layers": LayerSpec, "fp8": FP8, "fp8_recipe": FP8Recipe}


def engine(**options: Any) -> EngineConfig:
    options |= {name: kind(options[name]) for name, kind in ENUMS.items() if name in options}
    if "recompute_modules" in options:
        options["recompute_modules"] = [
            RecomputeModule(name) for name in options["recompute_modules"]
        ]
    return EngineConfig(**options)


def make_task(spec: dict) -> LMTask:
    """The task of ``spec``; it lays out this process's world, again where it was laid out."""
    config = configure(spec)
    problems = [*config.parallel.problems(), *config.engine.problems()]
    assert not problems, problems
    stage = config.stage
    assert isinstance(config.model, LMConfig)
    assert isinstance(stage, LMStageConfig)
    mesh = init_mesh(config.parallel, seed=5)
    spans, dida = spec.get("spans", False), "dida" in spec
    chunks = build_chunks(
        config.model,
        vocabulary_size=vocabulary_of(config.tokenizer).size if dida else VOCABULARY,
        parallel=config.parallel,
        engine=config.engine,
        precision=stage.precision,
        masks=MaskKind.intervals if spans or dida else MaskKind.packed_causal,
    )
    for chunk in chunks:
        initialize(chunk, seed=5, pad_id=0)
        if "lora" in spec:
            noisy_only = adapts_noisy_only(stage)
            train_adapters(chunk, config=lora(spec["lora"]), seed=5, noisy_only=noisy_only)
    if "merge" in spec:  # the weights of a checkpoint with these adapters
        folder, adapters = spec["merge"]
        sharded.load_weights(Path(folder), chunks=chunks, adapters=lora(adapters))
    if dida:
        return dida_task(config, mesh=mesh, chunks=chunks, size=spec.get("micro_batch_size", 2))
    documents = DrawnDocuments(
        mesh=mesh,
        micro_batch_size=spec.get("micro_batch_size", 2),
        packed=spec.get("packed", True),
        lengths=spec.get("lengths"),
    )
    return LMTask(
        config=config,
        mesh=mesh,
        chunks=chunks,
        loader=documents,  # type: ignore[arg-type]
        validation={
            "held_out": HeldOut(
                documents=DrawnHeldOut(mesh=mesh),  # type: ignore[arg-type]
                token_weights=weights_by_modality(stage.loss_weights),
            )
        },
        terms=[Term(name="labels", token_weights=weights_by_modality(stage.loss_weights))],
        sources=SOURCES,
        batch_mask=with_spans if spans else mask_of,
    )


def dida_task(config: RunConfig, *, mesh: Mesh, chunks: list[Emu35Model], size: int) -> LMTask:
    assert isinstance(config.stage, LMStageConfig)
    codebook_KD = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(1))
    learned = dida_objective(mesh, config=config, codebook_KD=codebook_KD)

    def documents(prepare: Any, size: int) -> PictureDocuments:
        return PictureDocuments(mesh=mesh, micro_batch_size=size, lay_out=lay_out, prepare=prepare)

    return LMTask(
        config=config,
        mesh=mesh,
        chunks=chunks,
        loader=documents(learned.prepare, size),  # type: ignore[arg-type]
        validation={
            f"held_out{suffix}": HeldOut(
                documents=HeldOutPictures(  # type: ignore[arg-type]
                    documents(view.prepare, ROWS // mesh.dp_size)
                ),
                token_weights=view.token_weights or learned.weigh(config.stage.loss_weights),
                finish=view.finish,
            )
            for suffix, view in learned.views.items()
        },
        terms=learned.terms,
        finish=learned.finish,
        tally=learned.tally,
        sources=SOURCES,
    )


def lora(values: dict) -> LoRAConfig:
    made = LoRAConfig(**values)
    made.targets = [LoRATarget(name) for name in made.targets]
    return made


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


def copies(task: LMTask) -> list[dict[str, float]]:
    """Of every rank: :func:`sums` of what is trained and not split over tensor-parallel ranks."""
    whole = {
        f"{index}.{name}"
        for index, chunk in enumerate(task.chunks)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and not getattr(parameter, "tensor_model_parallel", False)
    }
    return gather({name: value for name, value in sums(task).items() if name in whole})


def train(spec: dict) -> dict:
    """What rank 0 knows after the steps of ``spec``."""
    task = make_task(spec)
    observed = observe(task, spec=spec)
    if "load" in spec:
        task.load(Path(spec["load"]))
    if "first_step" in spec:
        task.loader.load_state_dict({"step": spec["first_step"] - 1})
    metrics = make_steps(task, count=spec.get("steps", 5))
    validation = task.validate(task.stage.steps) if spec.get("validate", True) else {}
    if "save" in spec:
        folder = Path(spec["save"])
        if is_main():
            folder.mkdir()
        barrier()
        state = task.save(folder)
        state.write()
        state.finish()
    return {
        "metrics": metrics,
        "validation": validation,
        "weights": sums(task),
        "copies": copies(task),
        **observed,
    }


def serve() -> None:
    """One rank of a pool: train what each line of standard input says. It ends with the test run,
    however that ends."""
    faulthandler.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for line in sys.stdin:
        outcome = train(json.loads(line))
        gc.collect()
        if is_main():
            print(json.dumps(outcome), file=ANSWERS, flush=True)


if __name__ == "__main__":
    # Answers go where rank 0's output went; what libraries print must not mix with them.
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if sys.argv[1] == "--pool":
        serve()
    else:
        outcome = train(json.loads(sys.argv[2]))
        if is_main():
            Path(sys.argv[1]).write_text(json.dumps(outcome))
    leave()
