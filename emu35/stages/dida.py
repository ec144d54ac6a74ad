"""Discrete diffusion adaptation (paper section 4.3): pretraining's assembly, with a noisy copy of
every picture behind each row and two losses, on the clean documents and on the copies."""

from functools import partial
from pathlib import Path

import torch

from emu35.config import PathKind, RunConfig
from emu35.config.dida import DiDAConfig
from emu35.data.batch import Batch
from emu35.dida.corrupt import Corruption
from emu35.dida.drop import PromptDrop
from emu35.dida.layout import NoisyCopies
from emu35.dida.path import build_path
from emu35.errors import ConfigError
from emu35.model.attention.support import MaskKind
from emu35.parallel.mesh import Mesh
from emu35.stages.pretrain import Objective, View, train_language_model
from emu35.tokens.text import build_text_tokenizer
from emu35.tokens.vocabulary import vocabulary_of
from emu35.train.objective import (
    Term,
    TokenWeights,
    Weigh,
    response_weights,
    weights_by_modality,
)
from emu35.train.trainer import FitResult
from emu35.vision.codec import read_codebook

VALIDATION_TIMES = (0.25, 0.5, 0.75)
"""Times at which the copies of validation pictures are predicted: ``NAME_t25`` and so on."""


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Adapt as configured, or continue what ``run_dir`` holds.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    codebook_KD = path_codebook(config)
    return train_language_model(
        config,
        run_dir=run_dir,
        objective=partial(dida_objective, config=config, codebook_KD=codebook_KD),
    )


def dida_objective(mesh: Mesh, *, config: RunConfig, codebook_KD: torch.Tensor) -> Objective:
    """The clean documents' next tokens, and the codes of noisy copies."""
    stage = config.stage
    assert isinstance(stage, DiDAConfig)
    path = build_path(
        stage.path,
        codebook_KD=codebook_KD.to(mesh.device),
        group=mesh.tp_group if mesh.tp_size > 1 else None,
    )
    vocabulary = vocabulary_of(config.tokenizer)
    weigh: Weigh = (
        partial(response_weights, vocabulary=vocabulary)
        if stage.responses_only
        else weights_by_modality
    )
    copies = NoisyCopies(
        vocabulary=vocabulary,
        room=stage.noisy_length,
        per_document=stage.noisy_images,
        answers_only=stage.responses_only,
        seed=config.seed,
    )
    drop = PromptDrop(
        tokenizer=build_text_tokenizer(config.tokenizer),
        share=stage.prompt_drop,
        seed=config.seed,
    )
    corruption = partial(
        Corruption,
        path=path,
        vocabulary=vocabulary,
        device=mesh.device,
        seed=config.seed,
        shift=stage.time_shift,
        reference_codes=stage.time_shift_codes,
    )
    views = {
        f"_t{round(100 * time)}": View(
            token_weights=noisy_weights,
            prepare=copies,
            finish=corruption(time=time, purpose="validation"),
            optional=True,
        )
        for time in VALIDATION_TIMES
    }
    return Objective(
        weigh=weigh,
        terms=[
            Term(
                name="next_token",
                token_weights=clean_weights(weigh(stage.loss_weights)),
                share=stage.ar_weight,
            ),
            Term(
                name="noisy",
                token_weights=noisy_weights,
                share=stage.noisy_weight,
                required=False,
            ),
        ],
        masks=MaskKind.intervals,
        prepare=lambda batch: copies(drop(batch)),
        finish=corruption(),
        tally=copies.tally,
        views={"": View(), **views},
    )


def noisy_weights(batch: Batch) -> torch.Tensor:
    """1 for every code of a noisy copy that has a label, fp32 [B, S]."""
    assert batch.noisy is not None
    return ((batch.noisy >= 0) & batch.label_valid).float()


def clean_weights(token_weights: TokenWeights) -> TokenWeights:
    """``token_weights`` outside the noisy copies."""

    def outside(batch: Batch) -> torch.Tensor:
        assert batch.noisy is not None
        return token_weights(batch) * (batch.noisy < 0)

    return outside


def path_codebook(config: RunConfig) -> torch.Tensor:
    """The codebook [K, D] whose distances the path measures; [K, 0] for paths that measure none.

    Raises:
        ConfigError, ReleaseError: it is missing, or another one than the tokens are of.
    """
    assert isinstance(config.stage, DiDAConfig)
    size, vision = config.tokenizer.codebook_size, config.tokenizer.vision
    if config.stage.path.kind is not PathKind.metric:
        return torch.empty(size, 0)
    if vision is None:
        raise ConfigError(
            "stage.path.kind=metric measures distances in the codebook, but tokenizer.vision names "
            "no image tokenizer; name one, or use mixture_uniform or absorbing"
        )
    codebook_KD = read_codebook(Path(vision).expanduser())
    if len(codebook_KD) != size:
        raise ConfigError(
            f"tokenizer.vision={vision} has {len(codebook_KD)} codes, but "
            f"tokenizer.codebook_size={size}; make them equal"
        )
    return codebook_KD
