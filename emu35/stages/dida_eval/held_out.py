"""Losses of codes in noisy copies of held-out pictures, by time: what stage=dida validates.

The noise is that of its validation, fixed by the seed, so that a time's loss is the one that a
run's log has under ``val/NAME_t50`` (where its rows are as long and its seed is the same).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from emu35.config import LossWeights, TokenDataConfig, ValidationConfig
from emu35.config.data import Damaged, Modality, Overlong
from emu35.data.batch import Batch, BatchChange, as_it_is
from emu35.data.loader import ValidationSet
from emu35.data.place import name_of, place_of
from emu35.data.scenes.quality import ScenePrompt
from emu35.data.shards import ShardMeta
from emu35.data.source import Source, check_vision
from emu35.data.writer import ShardWriter
from emu35.dida.corrupt import Corruption
from emu35.dida.layout import NoisyCopies
from emu35.dida.path import Path as ProbabilityPath
from emu35.errors import DataError
from emu35.model.context import AttentionContext
from emu35.model.logits import weighted_cross_entropy
from emu35.model.transformer import Emu35Model
from emu35.parallel.cpu import without_shim
from emu35.stages.dida import clean_weights, noisy_weights
from emu35.stages.dida_eval.decoders import Codes
from emu35.tokens.serialize import TokenSequence, image_tokens, modality_of
from emu35.tokens.template import PromptTemplate, Task, build_prompt
from emu35.tokens.text import TextTokenizer
from emu35.tokens.vocabulary import Vocabulary
from emu35.train.objective import (
    TokenWeights,
    counted_labels,
    mask_of,
    response_weights,
    weights_by_modality,
)
from emu35.vision.codec import weights_digest

ROWS_AT_ONCE = 4
"""Packed rows that go through the model at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLosses:
    """Losses of ``model`` in nats a code. Pictures of responses count where the model's prompts
    have the form of the release, else all pictures."""

    model: Emu35Model
    path: ProbabilityPath
    vocabulary: Vocabulary
    template: PromptTemplate
    data: TokenDataConfig
    seed: int

    def noisy(self, section: ValidationConfig, *, time: float) -> float | None:
        """The mean over all codes of noisy copies at ``time``, None where no picture fits a row.

        Raises:
            DataError: the shards cannot be used.
        """
        corruption = Corruption(
            path=self.path,
            vocabulary=self.vocabulary,
            device=self.model.output_weight.device,
            seed=self.seed,
            time=time,
            purpose="validation",
        )
        return self._mean(section, finish=corruption, token_weights=noisy_weights)

    def clean(self, section: ValidationConfig) -> float | None:
        """The mean over the same pictures' codes predicted one after another.

        Raises:
            DataError: the shards cannot be used.
        """
        wanted: LossWeights = counted_labels(Modality.visual)
        weigh = (
            partial(response_weights, vocabulary=self.vocabulary)
            if self._answers_only
            else weights_by_modality
        )
        return self._mean(section, finish=as_it_is, token_weights=clean_weights(weigh(wanted)))

    @property
    def _answers_only(self) -> bool:
        return self.template is PromptTemplate.official

    @torch.no_grad()
    def _mean(
        self, section: ValidationConfig, *, finish: BatchChange, token_weights: TokenWeights
    ) -> float | None:
        documents = ValidationSet(
            config=section,
            data=self.data,
            vocabulary=self.vocabulary,
            micro_batch_size=ROWS_AT_ONCE,
            dp_rank=0,
            dp_size=1,
            prepare=NoisyCopies(
                vocabulary=self.vocabulary,
                room=self.data.sequence_length,  # copies of a row are never longer than the row
                answers_only=self._answers_only,
                seed=self.seed,
            ),
        )
        total = weight = 0.0
        for batch in documents:
            weights_BS = token_weights(batch)
            if (count := float(weights_BS.sum())) > 0:
                total += self._sum(finish(batch), weights_BS=weights_BS)
                weight += count
        return total / weight if weight else None

    def _sum(self, batch: Batch, *, weights_BS: torch.Tensor) -> float:
        assert batch.noisy is not None
        device = self.model.output_weight.device
        mask, placed = mask_of(batch), batch.to(device)
        context = AttentionContext(
            positions_BS=placed.positions, mask=mask, adapted_BS=(batch.noisy >= 0).to(device)
        )
        with without_shim():
            hidden_SBH = self.model(placed.tokens, context=context)
        loss, _ = weighted_cross_entropy(
            self.model,
            hidden_SBH=hidden_SBH,
            labels_BS=placed.labels,
            weights_BS=weights_BS.to(device),
        )
        return float(loss)


@contextmanager
def shards_of(
    prompts: Sequence[ScenePrompt],
    *,
    codes: Sequence[Codes],
    template: PromptTemplate,
    tokenizer: TextTokenizer,
    kind: str,
) -> Iterator[ValidationConfig]:
    """Documents in which ``prompts`` are answered by pictures of ``codes``, as token shards that
    are there within the body. ``kind`` is that of the text tokenizer.

    Raises:
        DataError: a code lies outside the codebook.
    """
    vocabulary = tokenizer.vocabulary
    meta = ShardMeta(
        source="prompts",
        kind=kind,
        n_text=vocabulary.n_text,
        codebook_size=vocabulary.codebook_size,
    )
    end = [vocabulary.ess] if template is PromptTemplate.official else []
    with TemporaryDirectory(prefix="emu35-held-out-") as folder:
        with ShardWriter(folder=Path(folder), meta=meta) as writer:
            for number, (prompt, codes_HW) in enumerate(zip(prompts, codes, strict=True)):
                asked = build_prompt(
                    Task.t2i, prompt.prompt, tokenizer=tokenizer, template=template
                ).conditional
                ids = [*asked, *image_tokens(codes_HW, tokenizer), *end, vocabulary.eos]
                tokens = np.array(ids, dtype=np.uint32)
                modality = modality_of(tokens, vocabulary=vocabulary)
                writer.append(
                    TokenSequence(tokens=tokens, modality=modality), document_id=str(number)
                )
        yield ValidationConfig(path=folder, modality=Modality.visual, max_documents=len(prompts))


def check_codes(section: ValidationConfig, *, vocabulary: Vocabulary, vision: Path) -> None:
    """Check that the pictures of shards have codes of the image tokenizer in ``vision``.

    Raises:
        DataError: they are of another one, or the shards cannot be read.
    """
    place = place_of(section.path)
    source = Source(name=name_of(place), path=place, vocabulary=vocabulary)
    encoded = check_vision([source])
    if encoded is not None and encoded.digest != (ours := weights_digest(vision)):
        raise DataError(
            f"shard {encoded.shard} holds pictures encoded by an image tokenizer with weights "
            f"{encoded.digest[:12]}, but that of the model, {vision}, has weights {ours[:12]}; "
            "give shards that were made with this one"
        )


def without_cuts(data: TokenDataConfig) -> TokenDataConfig:
    """``data`` in which documents longer than a row are left out: a cut one may have lost its
    prompt. Damage is refused: two evaluations are to have seen the same."""
    return replace(data, overlong=Overlong.drop, damaged=Damaged.refuse)
