"""What the training-step benchmark compares: one row of tokens, and three ways to learn from it.

Every contestant is a function that makes one training step (forward, backward, gradient clipping,
AdamW) and returns the loss before it. Sizes: B rows (always 1), S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from hf_qwen3 import hf_qwen3
from plain_transformer import PlainTransformer
from rounds import Step
from same_batch import SameBatch

from emu35.checkpoint.hf import to_hf
from emu35.config import (
    LMConfig,
    LossWeights,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    Schedule,
)
from emu35.data.batch import Batch
from emu35.data.loader import TokenLoader
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.parallel.mesh import Mesh
from emu35.train.objective import Term, weights_by_modality
from emu35.train.step import LMTask

VOCABULARY, LEARNING_RATE, CLIP = 8192, 1e-4, 1.0
IGNORED = -100
"""Hugging Face's label for a token without a loss."""

MODEL = LMConfig(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_position_embeddings=8192,
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """One row of random tokens [1, S] that holds whole documents and nothing else.

    Attributes:
        lengths: tokens of each document; they fill the row.
        tokens_BS: int64 ids.
        positions_BS: int64, from 0 in every document.
        document_start_BS: int64, the column where the token's document begins.
    """

    lengths: tuple[int, ...]
    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    document_start_BS: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Row":
        """The row whose documents have these lengths; equal lengths give equal rows."""
        generator = torch.Generator().manual_seed(0)
        lengths_D = torch.tensor(lengths)
        starts_S = (lengths_D.cumsum(0) - lengths_D).repeat_interleave(lengths_D)
        return cls(
            lengths=tuple(lengths),
            tokens_BS=torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator),
            positions_BS=(torch.arange(sum(lengths)) - starts_S)[None],
            document_start_BS=starts_S[None],
        )

    def batch(self) -> Batch:
        """The row as our loader hands it on; the last token of a document has no label."""
        labels_BS = self.tokens_BS.roll(-1, 1)
        valid_BS = self.positions_BS.roll(-1, 1) > 0
        return Batch(
            tokens=self.tokens_BS,
            labels=labels_BS,
            label_modality=torch.zeros_like(self.tokens_BS, dtype=torch.uint8),
            label_valid=valid_BS,
            label_source=torch.zeros_like(self.tokens_BS, dtype=torch.int16),
            positions=self.positions_BS,
            document_start=self.document_start_BS,
            sample_ids=[0],
        )

    def labels_unshifted(self) -> torch.Tensor:
        """Labels as Hugging Face's models take them: the tokens, which the model shifts itself,
        without the first of each document."""
        return self.tokens_BS.masked_fill(self.positions_BS == 0, IGNORED)

    def additive_mask(self) -> torch.Tensor:
        """What each token may attend to, fp32 [1, 1, S, S]: 0 in the past of its own document,
        -inf elsewhere. Additive is the form that scaled-dot-product attention on a CPU takes as it
        is; a boolean mask would be turned into it anew in every layer."""
        rows_S = torch.arange(self.tokens_BS.shape[1])
        start_S1 = self.document_start_BS[0, :, None]
        seen_SS = (rows_S >= start_S1) & (rows_S <= rows_S[:, None])
        return torch.zeros(seen_SS.shape).masked_fill_(~seen_SS, float("-inf"))[None, None]


@dataclass(kw_only=True, slots=True)
class Contestants:
    """Steps on ``row`` by name, in the order in which they are timed."""

    row: Row
    steps: dict[str, Step]


def on_plain_row(length: int, *, mesh: Mesh) -> Contestants:
    """All three on one causal document, each in the form that is natural to it (no mask)."""
    row = Row.of([length])
    ours, weights = our_step(row, mesh=mesh)
    tokens_BS = row.tokens_BS.to(mesh.device)
    hf = hf_model(weights)
    plain = PlainTransformer(MODEL, vocabulary_size=VOCABULARY)
    plain.load_state_dict(weights)
    return Contestants(
        row=row,
        steps={
            "emu35": ours,
            "HF Qwen3": torch_step(
                hf,
                loss=lambda: hf(input_ids=tokens_BS, labels=tokens_BS).loss,
                device=mesh.device,
            ),
            "plain torch": torch_step(plain, loss=lambda: plain(tokens_BS), device=mesh.device),
        },
    )


def on_packed_row(lengths: Sequence[int], *, mesh: Mesh) -> Contestants:
    """Ours and Hugging Face's on several documents in one row: ours with the intervals that the
    loader describes, theirs with the equal matrix and the equal positions."""
    row = Row.of(lengths)
    ours, weights = our_step(row, mesh=mesh)
    model = hf_model(weights)
    arguments = {
        "input_ids": row.tokens_BS.to(mesh.device),
        "labels": row.labels_unshifted().to(mesh.device),
        "position_ids": row.positions_BS.to(mesh.device),
        "attention_mask": row.additive_mask().to(mesh.device),
    }
    theirs = torch_step(model, loss=lambda: model(**arguments).loss, device=mesh.device)
    return Contestants(row=row, steps={"emu35": ours, "HF Qwen3": theirs})


def our_step(row: Row, *, mesh: Mesh) -> tuple[Step, dict[str, torch.Tensor]]:
    """The step of the task that pretraining hands to the trainer, and the weights before it, named
    as in Hugging Face's Qwen3."""
    run = RunConfig(
        model=MODEL,
        stage=PretrainConfig(global_batch_size=1),
        optim=OptimConfig(
            lr=LEARNING_RATE, warmup_steps=0, schedule=Schedule.constant, clip_grad=CLIP
        ),
    )
    chunks = build_chunks(MODEL, vocabulary_size=VOCABULARY, parallel=run.parallel)
    initialize(chunks[0], seed=run.seed)
    task = LMTask(
        config=run,
        mesh=mesh,
        chunks=chunks,
        loader=cast(TokenLoader, SameBatch(row.batch())),
        validation={},
        terms=[Term(name="labels", token_weights=weights_by_modality(LossWeights()))],
    )
    state = {name: value.detach().clone() for name, value in chunks[0].named_parameters()}
    weights = to_hf(state, config=MODEL, vocabulary_size=VOCABULARY)
    return lambda: task.train_step(1)["loss"], weights


def hf_model(weights: dict[str, torch.Tensor]) -> Any:
    """Hugging Face's model of the same shape with these weights."""
    return hf_qwen3(weights, config=MODEL, vocabulary_size=VOCABULARY)


def torch_step(model: Any, *, loss: Callable[[], Any], device: torch.device) -> Step:
    """The usual loop body around a torch module, with the optimizer settings of ours."""
    model.to(device).train()
    settings = OptimConfig()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": settings.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )

    def step() -> float:
        # Without a GPU our CPU shim watches every torch call of the process. Its cost is ours
        # alone, so the others run outside it.
        with torch._C.DisableTorchFunction():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            return value.item()

    return step
