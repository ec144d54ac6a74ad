"""The training step of discrete diffusion adaptation: segments beside the dense mask.

A step is what the stage runs: noisy codes drawn along the metric path, the batch through
megatron-core's schedule, both losses, clipping and AdamW, in fp32 on one packed row. The row holds
documents of two texts and two pictures, and behind them a noisy copy of every picture. Both
contestants are the same model on the same row; only ``model.attention_backend`` differs.

Suffixes: S tokens of a row.
"""

import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peak_memory import Peak
from rounds import Step, check_equal, time_step
from same_batch import SameBatch

from emu35.config import (
    AttentionBackend,
    DiDAConfig,
    LMConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    Schedule,
    TokenizerConfig,
)
from emu35.data.batch import Batch
from emu35.data.loader import TokenLoader
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.parallel.mesh import Mesh, init_mesh
from emu35.stages.dida import dida_objective
from emu35.tokens.document import Document, Image, Part, Text
from emu35.tokens.serialize import TokenSequence, serialize
from emu35.tokens.text import build_text_tokenizer
from emu35.tokens.vocabulary import vocabulary_of
from emu35.train.step import LMTask

CODES, EMBEDDING = 1024, 16
WORDS = 120
"""Bytes, hence tokens, of each text."""
BLOCK = 128
TOLERANCE = 1e-4
TOKENIZER = TokenizerConfig(codebook_size=CODES)
BACKENDS = (AttentionBackend.segment, AttentionBackend.dense)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """``documents`` of two pictures of ``side`` x ``side`` codes; ``clean`` and ``noisy`` are the
    columns for the documents and for the copies, whole blocks of 128 for every document."""

    documents: int
    side: int

    @property
    def clean(self) -> int:
        return self.documents * _blocks(len(document(self.side, seed=0)))

    @property
    def noisy(self) -> int:
        # IMG, the codes and the ends of all rows but the last.
        return self.documents * _blocks(2 * (self.side * self.side + self.side))

    @property
    def tokens(self) -> int:
        return self.clean + self.noisy


def document(side: int, *, seed: int) -> TokenSequence:
    """Text, picture, text, picture; equal for equal arguments."""
    rng = np.random.default_rng(seed)
    parts: list[Part] = [
        part
        for _ in range(2)
        for part in (
            Text("".join(map(chr, rng.integers(97, 123, WORDS)))),
            Image(rng.integers(0, CODES, (side, side))),
        )
    ]
    return serialize(Document(parts), build_text_tokenizer(TOKENIZER))


def packed_row(shape: RowShape) -> Batch:
    """The clean row as the loader makes it: the documents one after the other, then padding."""
    width, pad = shape.clean, vocabulary_of(TOKENIZER).pad
    ids_S, labels_S = torch.full((width,), pad), torch.full((width,), pad)
    modality_S = torch.zeros(width, dtype=torch.uint8)
    valid_S = torch.zeros(width, dtype=torch.bool)
    positions_S, start_S = torch.zeros_like(ids_S), torch.full((width,), width)
    first = 0
    for number in range(shape.documents):
        made = document(shape.side, seed=number)
        tokens = torch.from_numpy(made.tokens.astype(np.int64))
        end = first + len(tokens)
        ids_S[first:end], positions_S[first:end] = tokens, torch.arange(len(tokens))
        labels_S[first : end - 1] = tokens[1:]
        modality_S[first : end - 1] = torch.from_numpy(made.modality[1:])
        valid_S[first : end - 1], start_S[first:end] = True, first
        first = end
    return Batch(
        tokens=ids_S[None],
        labels=labels_S[None],
        label_modality=modality_S[None],
        label_valid=valid_S[None],
        label_source=torch.zeros(1, width, dtype=torch.int16),
        positions=positions_S[None],
        document_start=start_S[None],
        sample_ids=[0],
    )


def training_step(backend: AttentionBackend, *, shape: RowShape, mesh: Mesh) -> Step:
    """The step of the task that the stage hands to the trainer."""
    config = RunConfig(
        tokenizer=TOKENIZER,
        model=LMConfig(
            num_layers=2,
            hidden_size=256,
            ffn_hidden_size=768,
            num_attention_heads=8,
            num_kv_heads=4,
            head_dim=32,
            max_position_embeddings=shape.clean,
            attention_backend=backend,
        ),
        # Nothing in these documents is a response, and dropped prompts would make rows unlike.
        stage=DiDAConfig(
            global_batch_size=1,
            precision=Precision.fp32,
            noisy_length=shape.noisy,
            responses_only=False,
            prompt_drop=0.0,
        ),
        optim=OptimConfig(lr=1e-4, warmup_steps=0, schedule=Schedule.constant),
    )
    model, stage = config.model, config.stage
    assert isinstance(model, LMConfig)
    assert isinstance(stage, DiDAConfig)
    codebook_KD = torch.randn(CODES, EMBEDDING, generator=torch.Generator().manual_seed(0))
    learned = dida_objective(mesh, config=config, codebook_KD=codebook_KD)
    chunks = build_chunks(
        model,
        vocabulary_size=vocabulary_of(TOKENIZER).size,
        parallel=config.parallel,
        precision=stage.precision,
        masks=learned.masks,
    )
    initialize(chunks[0], seed=config.seed)
    task = LMTask(
        config=config,
        mesh=mesh,
        chunks=chunks,
        loader=cast(TokenLoader, SameBatch(learned.prepare(packed_row(shape)))),
        validation={},
        terms=learned.terms,
        finish=learned.finish,
        tally=learned.tally,
    )
    return lambda: task.train_step(1)["loss"]


def measure_time(shape: RowShape, *, rounds: int, mesh: Mesh) -> dict[str, Any]:
    """Both backends in turn, after a round that warms up.

    Raises:
        SystemExit: their losses differ, at first or at the end.
    """
    steps = {backend.value: training_step(backend, shape=shape, mesh=mesh) for backend in BACKENDS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        timed = {name: time_step(step) for name, step in steps.items()}
        losses = {name: loss for name, (loss, _) in timed.items()}
        check_equal(losses, when=f"at step {number + 1}", tolerance=TOLERANCE)
        for name, (_, duration) in timed.items():
            if number:
                seconds[name].append(duration)
        if sys.stderr.isatty():
            print(f"round {number} of {rounds}", file=sys.stderr)
    pairs = zip(seconds["dense"], seconds["segment"], strict=True)
    speedup = statistics.median(dense / segment for dense, segment in pairs)
    medians = {name: round(1e3 * statistics.median(found), 1) for name, found in seconds.items()}
    shown = ", ".join(f"{name} {found:,} ms" for name, found in medians.items())
    print(f"training step, {shape.tokens:,} tokens ({shape.noisy:,} for copies): {shown}")
    return {
        "train_step_speedup": round(speedup, 3),
        "train_step_tokens": shape.tokens,
        **{f"train_step_ms_{name}": found for name, found in medians.items()},
    }


def measure_memory(shapes: list[RowShape]) -> dict[str, Any]:
    """What a step needs above the model, in a process of its own for each backend and length.

    To be called before this process computes anything: the others are forked from it.
    """
    found = {
        backend.value: [_in_another_process(backend, shape=shape) for shape in shapes]
        for backend in BACKENDS
    }
    print(f"{'memory of a step, MiB':24} " + " ".join(f"{s.tokens:>9,}" for s in shapes))
    for name, sizes in found.items():
        print(f"  {name:22} " + " ".join(f"{size / 2**20:9.0f}" for size in sizes))
    longer = shapes[-1].tokens / shapes[-2].tokens
    return {
        "memory_tokens": [shape.tokens for shape in shapes],
        **{
            f"memory_mib_{name}": [round(size / 2**20, 1) for size in sizes]
            for name, sizes in found.items()
        },
        # By which power of the length it grows from the last but one to the last: 1 is linear.
        **{
            f"memory_power_{name}": round(float(np.log(sizes[-1] / sizes[-2]) / np.log(longer)), 3)
            for name, sizes in found.items()
        },
    }


def _in_another_process(backend: AttentionBackend, *, shape: RowShape) -> int:
    """Raises: BrokenProcessPool where it ends early, of a lack of memory usually."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(_peak_of_a_step, backend, shape).result()


def _peak_of_a_step(backend: AttentionBackend, shape: RowShape) -> int:
    step = training_step(backend, shape=shape, mesh=init_mesh(ParallelConfig(), seed=0))
    peak = Peak()
    step()
    return peak.above_start()


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
