"""What a token's loss is worth, and what is reported about it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from emu35.config import LossWeights
from emu35.config.data import Modality as LossModality
from emu35.data.batch import Batch
from emu35.model.context_parallel import SequenceSplit
from emu35.model.mask import AttentionMask
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary

TokenWeights = Callable[[Batch], torch.Tensor]
"""Batch -> fp32 [B, S]: the weight of every label."""

Weigh = Callable[[LossWeights], TokenWeights]
"""What a stage learns: how it turns weights by modality into weights of labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A part of the loss: ``share`` times the mean cross-entropy under ``token_weights``, over the
    whole global batch. Where no label of a step has a weight in it, it is 0 in that step, or, if it
    is ``required``, the step is refused."""

    name: str
    token_weights: TokenWeights
    share: float = 1.0
    required: bool = True


def weights_by_modality(weights: LossWeights) -> TokenWeights:
    """Every valid label, weighted by its modality (paper section 3.2: visual 0.5, text 1.0)."""
    table = _table(weights)

    def token_weights(batch: Batch) -> torch.Tensor:
        return table[batch.label_modality.long()] * batch.label_valid

    return token_weights


def response_weights(weights: LossWeights, *, vocabulary: Vocabulary) -> TokenWeights:
    """As ``weights_by_modality``, but only labels of responses count: in every turn of a document
    those after BSS, up to and with ESS, and the EOS that follows the last ESS. Fine-tuning learns
    what is answered, and neither the prompt nor a later turn's question (paper section 4.1). A
    document without BSS counts nothing. Takes whole rows."""
    by_modality = weights_by_modality(weights)
    bss, ess, eos = vocabulary.bss, vocabulary.ess, vocabulary.eos

    def token_weights(batch: Batch) -> torch.Tensor:
        tokens_BS, labels_BS = batch.tokens, batch.labels
        opened_BS = _latest(tokens_BS == bss)
        ended_BS = _latest(tokens_BS == ess)
        answered_BS = opened_BS >= batch.document_start
        inside_BS = answered_BS & (opened_BS > ended_BS) & (labels_BS != bss)
        end_BS = answered_BS & (opened_BS < ended_BS) & (labels_BS == eos)
        return by_modality(batch) * (inside_BS | end_BS)

    return token_weights


def _latest(marked_BS: torch.Tensor) -> torch.Tensor:
    """The column, up to each one, that was marked last; -1 before the first."""
    columns_S = torch.arange(marked_BS.shape[1], device=marked_BS.device)
    return torch.where(marked_BS, columns_S, -1).cummax(1).values


def counted_labels(modality: LossModality) -> LossWeights:
    """Weight 1 for what a validation set counts: all, text only or visual only."""
    if modality is LossModality.text:
        return LossWeights(text=1.0, visual=0.0, layout=0.0, control=0.0)
    if modality is LossModality.visual:
        return LossWeights(text=0.0, visual=1.0, layout=0.0, control=0.0)
    return LossWeights(text=1.0, visual=1.0, layout=1.0, control=1.0)


def _table(weights: LossWeights) -> torch.Tensor:
    by_code = {
        Modality.TEXT: weights.text,
        Modality.VISUAL: weights.visual,
        Modality.LAYOUT: weights.layout,
        Modality.CONTROL: weights.control,
    }
    return torch.tensor([by_code[code] for code in sorted(by_code)], dtype=torch.float32)


BatchMask = Callable[[Batch], AttentionMask]
"""Batch -> which keys each row sees."""


def mask_of(batch: Batch) -> AttentionMask:
    """Plain causal attention within documents, or what the batch says itself."""
    if batch.intervals is not None:
        return AttentionMask.from_intervals(batch.intervals)
    return AttentionMask.causal(batch.document_start)


Tally = Callable[[Batch], Mapping[str, float]]
"""What a stage counts in a batch besides tokens; the same names for every batch."""


def nothing(batch: Batch) -> Mapping[str, float]:
    """A stage that counts nothing."""
    del batch
    return {}


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """What this rank computes of a batch: label weights by term of the loss, raw, and what they
    come to together once each is divided by its sum over the global batch; and the mask (on the
    CPU). Under context parallelism its tensors hold this rank's columns, those of ``split``;
    ``tokens`` of documents, those ``copied`` behind them, and ``visible_pairs`` of query and key
    count the whole batch."""

    batch: Batch
    weights_TBS: torch.Tensor
    normalised_BS: torch.Tensor
    mask: AttentionMask
    split: SequenceSplit | None
    tokens: int
    visible_pairs: int
    copied: int = 0

    def on(self, device: torch.device) -> "MicroBatch":
        """The same with its tensors on ``device``; the mask stays."""
        return replace(
            self,
            batch=self.batch.to(device),
            weights_TBS=self.weights_TBS.to(device),
            normalised_BS=self.normalised_BS.to(device),
        )


@dataclass(kw_only=True, slots=True)
class LossReport:
    """Sums that add up over micro-batches and ranks.

    ``text`` and ``visual`` count labels of the first term of the loss. ``term`` and ``term_weight``
    are, for each term, the weighted loss and the weights, both raw. ``source_weighted`` and
    ``source_weight`` are, for each source of the mixture, its part of the weighted loss and of the
    label weights, both of which are shares of the global batch.
    """

    weighted: float = 0.0
    text: float = 0.0
    text_tokens: float = 0.0
    visual: float = 0.0
    visual_tokens: float = 0.0
    term: list[float] = field(default_factory=list[float])
    term_weight: list[float] = field(default_factory=list[float])
    source_weighted: list[float] = field(default_factory=list[float])
    source_weight: list[float] = field(default_factory=list[float])

    @staticmethod
    def size(*, terms: int, sources: int) -> int:
        """Numbers in the vector of a report on that many terms and sources."""
        return 5 + 2 * terms + 2 * sources

    @staticmethod
    def of(
        *, loss: torch.Tensor, losses_BS: torch.Tensor, micro_batch: MicroBatch, sources: int
    ) -> torch.Tensor:
        """The sums of one micro-batch as one fp64 vector, in field order."""
        weights_TBS = micro_batch.weights_TBS.double()
        counted_BS = weights_TBS[0] > 0
        modality_BS = micro_batch.batch.label_modality
        sums = [loss.detach().double()]
        for code in (Modality.TEXT, Modality.VISUAL):
            chosen_BS = counted_BS & (modality_BS == code)
            sums += [losses_BS[chosen_BS].double().sum(), chosen_BS.sum().double()]
        terms = [(weights_TBS * losses_BS).sum((1, 2)), weights_TBS.sum((1, 2))]
        by_source = _by_source(losses_BS, micro_batch, sources=sources)
        return torch.cat([torch.stack(sums), *terms, *by_source])

    @classmethod
    def from_vector(cls, vector: torch.Tensor, *, terms: int) -> "LossReport":
        weighted, text, text_tokens, visual, visual_tokens, *rest = vector.tolist()
        sources = rest[2 * terms :]
        return cls(
            weighted=weighted,
            text=text,
            text_tokens=text_tokens,
            visual=visual,
            visual_tokens=visual_tokens,
            term=rest[:terms],
            term_weight=rest[terms : 2 * terms],
            source_weighted=sources[: len(sources) // 2],
            source_weight=sources[len(sources) // 2 :],
        )

    def metrics(
        self, *, terms: Sequence[str] = (), sources: Sequence[str] = ()
    ) -> dict[str, float]:
        """``loss`` and, for each modality that occurred, its mean cross-entropy in nats.

        For each of ``terms`` (names, in order) that occurred ``loss_NAME``, its mean. For each of
        ``sources`` (names, in order) also ``share/NAME``, its share of the label weights, 0 where
        none of its labels counted, and otherwise ``loss/NAME``, its mean with the label weights:
        the losses of the sources, weighted by their shares, add up to ``loss`` divided by the sum
        of its terms' shares.
        """
        metrics = {"loss": self.weighted}
        if self.text_tokens:
            metrics["loss_text"] = self.text / self.text_tokens
        if self.visual_tokens:
            metrics["loss_visual"] = self.visual / self.visual_tokens
        if terms:
            for name, total, weight in zip(terms, self.term, self.term_weight, strict=True):
                if weight > 0:
                    metrics[f"loss_{name}"] = total / weight
        whole = math.fsum(self.source_weight) or 1.0
        for name, weighted, weight in zip(
            sources, self.source_weighted, self.source_weight, strict=True
        ):
            metrics[f"share/{name}"] = weight / whole
            if weight > 0:
                metrics[f"loss/{name}"] = weighted / weight
        return metrics


def _by_source(
    losses_BS: torch.Tensor, micro_batch: MicroBatch, *, sources: int
) -> list[torch.Tensor]:
    """Weighted loss and weight of each source, each fp64 [sources]."""
    if not sources:
        return []
    # A sum over a mask each instead of a scatter: the same numbers every time, on a GPU as well.
    numbers_N11 = torch.arange(sources, device=losses_BS.device)[:, None, None]
    weights_BS = micro_batch.normalised_BS.double()
    weights_NBS = weights_BS * (micro_batch.batch.label_source == numbers_N11)
    return [(weights_NBS * losses_BS).sum((1, 2)), weights_NBS.sum((1, 2))]
