"""A run folder with a tiny model of random weights, to generate from."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tiny_vision import write_tiny_ibq

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.config import (
    CheckpointConfig,
    LMConfig,
    LMStageConfig,
    PretrainConfig,
    RunConfig,
    TokenizerConfig,
)
from emu35.config.io import write_config
from emu35.config.stage import adapters_of, adapts_noisy_only
from emu35.inference.grammar import GridSize
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.model.lora import adapted_linears, train_adapters
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.generate.options import GenerateOptions
from emu35.tokens.vocabulary import vocabulary_of

CODES = 64
PROMPTS = ["a red circle", "two blue squares on the left", "x"]


def write_run(
    root: Path,
    *,
    positions: int = 256,
    draws: bool = False,
    eager: float = 3.0,
    kv_heads: int = 1,
    stage: LMStageConfig | None = None,
) -> Path:
    """A run folder below ``root`` as ``stage`` (pretraining) leaves it. A model that ``draws``
    begins an image about every thirty tokens of text (``eager`` 3; 12: at once), and hardly ever
    ends its answer. Adapters
    that the stage trains have learned something."""
    write_tiny_ibq(root / "vision", codes=CODES)
    model = LMConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=positions,
        init_std=0.02 if draws else 0.3,
    )
    config = RunConfig(
        run_dir=str(root / "run"),
        model=model,
        tokenizer=TokenizerConfig(codebook_size=CODES, vision=str(root / "vision")),
        stage=stage or PretrainConfig(),
    )
    folder = root / "run"
    folder.mkdir()
    write_config(config, folder)
    vocabulary = vocabulary_of(config.tokenizer)
    single_process_mesh()
    built = build_model(model, vocabulary_size=vocabulary.size)
    initialize(built, seed=5, pad_id=vocabulary.pad)
    if draws:
        prefer(built, ids={vocabulary.boi: eager, vocabulary.eos: -6.0})
    if (adapters := adapters_of(config.stage)) is not None:
        train_adapters(built, config=adapters, seed=1, noisy_only=adapts_noisy_only(config.stage))
        for linear in adapted_linears(built).values():
            assert linear.adapter is not None
            torch.nn.init.normal_(linear.adapter.b, std=0.3)
    manager = CheckpointManager(root=folder / "checkpoints", config=CheckpointConfig(), identity={})
    manager.save(1, write=lambda to: sharded.save(to, chunks=[built], optimizer=None), extra={})
    return folder


def prefer(model: Emu35Model, *, ids: dict[int, float]) -> None:
    """Add about so much to the logits of ``ids``: all hidden states get one large component, which
    the normalisation makes constant, and only these ids look at it."""
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        parameters["embedding.word_embeddings.weight"][:, 0] = 10.0
        output_VH = parameters["output_layer.weight"]
        output_VH[:, 0] = 0.0
        for id, logit in ids.items():
            output_VH[id, 0] = logit / model.lm_config.hidden_size**0.5


def options(run: Path, out: Path, **changes: object) -> GenerateOptions:
    base = GenerateOptions(
        source=run, prompts=PROMPTS, out=out, size=GridSize(height=3, width=4), guidance=3.0
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
