import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.config import LossWeights
from emu35.data.batch import Batch
from emu35.model.mask import AttentionMask
from emu35.tokens.serialize import Modality
from emu35.tokens.vocabulary import Vocabulary
from emu35.train.objective import (
    LossReport,
    MicroBatch,
    response_weights,
    weights_by_modality,
)

VOCABULARY = Vocabulary(n_text=256, codebook_size=16)
T, V, C = Modality.TEXT, Modality.VISUAL, Modality.CONTROL


def packed(*documents: list[tuple[int, Modality]], columns: int) -> Batch:
    """One row holding ``documents`` of (id, modality of the id), padded to ``columns``."""
    pad = VOCABULARY.pad
    tokens = torch.full((1, columns), pad)
    labels, modality = tokens.clone(), torch.zeros(1, columns, dtype=torch.uint8)
    valid, start = torch.zeros(1, columns, dtype=torch.bool), torch.full((1, columns), columns)
    first = 0
    for document in documents:
        for offset, (id, _) in enumerate(document):
            column = first + offset
            tokens[0, column], start[0, column] = id, first
            if offset + 1 < len(document):
                labels[0, column], modality[0, column] = document[offset + 1]
                valid[0, column] = True
        first += len(document)
    return Batch(
        tokens=tokens,
        labels=labels,
        label_modality=modality,
        label_valid=valid,
        label_source=torch.zeros_like(tokens, dtype=torch.int16),
        positions=torch.zeros_like(tokens),
        document_start=start,
        sample_ids=[0],
    )


def test_only_what_follows_bss_in_the_same_document_is_learned() -> None:
    bss, ess, eos = VOCABULARY.bss, VOCABULARY.ess, VOCABULARY.eos
    code = VOCABULARY.visual(3)
    asked = [(VOCABULARY.bos, C), (70, T), (71, T), (bss, C), (72, T), (code, V), (ess, C)]
    plain = [(VOCABULARY.bos, C), (80, T), (81, T), (eos, C)]
    batch = packed(asked, plain, [(bss, C), (90, T)], columns=15)
    weights = LossWeights(text=1.0, visual=0.5, layout=0.25, control=0.125)

    response = response_weights(weights, vocabulary=VOCABULARY)(batch)[0].tolist()

    # A column holds the weight of the token after it: nothing up to and with BSS itself.
    assert response[:7] == [0, 0, 0, 1.0, 0.5, 0.125, 0]
    assert response[7:11] == [0, 0, 0, 0], "a document without a response teaches nothing"
    assert response[11:] == [1.0, 0, 0, 0], "a response that opens its document, then padding"
    everything = weights_by_modality(weights)(batch)[0].tolist()
    assert everything[:7] == [1.0, 1.0, 0.125, 1.0, 0.5, 0.125, 0]


def test_the_report_by_source_is_the_mean_over_the_labels_that_count() -> None:
    """Against plain loops: three sources, of which the middle one has no label that counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 12)
    batch = packed([(70, T)] * 12, columns=12)
    batch.label_source = torch.tensor([[0] * 6 + [1] * 6, [2] * 12], dtype=torch.int16)
    weights_BS = torch.tensor([[1.0, 0.5, 0.0] * 2 + [0.0] * 6, [0.5, 0.0, 1.0, 1.0] * 3])
    normalised_BS = weights_BS / weights_BS.sum()
    losses_BS = torch.rand(shape, generator=generator) * (weights_BS > 0)
    micro_batch = MicroBatch(
        batch=batch,
        weights_TBS=weights_BS[None],
        normalised_BS=normalised_BS,
        mask=AttentionMask.causal(batch.document_start),
        split=None,
        tokens=24,
        visible_pairs=0,
    )
    loss = (normalised_BS * losses_BS).sum()
    vector = LossReport.of(loss=loss, losses_BS=losses_BS, micro_batch=micro_batch, sources=3)
    assert len(vector) == LossReport.size(terms=1, sources=3)

    metrics = LossReport.from_vector(vector, terms=1).metrics(sources=["a", "b", "c"])

    for name, number in (("a", 0), ("c", 2)):
        labels = [
            (weights_BS[r, s].item(), losses_BS[r, s].item())
            for r in range(2)
            for s in range(12)
            if batch.label_source[r, s] == number
        ]
        total = sum(weight for weight, _ in labels)
        mean = sum(weight * value for weight, value in labels) / total
        assert metrics[f"loss/{name}"] == pytest.approx(mean, rel=1e-6)
        assert metrics[f"share/{name}"] == pytest.approx(total / weights_BS.sum().item(), rel=1e-6)
    assert "loss/b" not in metrics
    assert metrics["share/b"] == 0


def learned_by_reading(document: list[int]) -> list[bool]:
    """Whether each label of a document is learned, decided token by token."""
    bss, ess, eos = VOCABULARY.bss, VOCABULARY.ess, VOCABULARY.eos
    inside = ended = False
    learned: list[bool] = []
    for token, label in zip(document, [*document[1:], None], strict=True):
        if token == bss:
            inside, ended = True, False
        elif token == ess and inside:
            inside, ended = False, True
        learned.append(label is not None and label != bss and (inside or (ended and label == eos)))
    return learned


MARKS = st.sampled_from([VOCABULARY.bss, VOCABULARY.ess, VOCABULARY.eos, VOCABULARY.bos, 65, 66])


@settings(max_examples=200, deadline=None)
@given(documents=st.lists(st.lists(MARKS, min_size=1, max_size=9), max_size=5))
def test_weights_are_those_of_reading_each_document_token_by_token(
    documents: list[list[int]],
) -> None:
    batch = packed(*([(id, T) for id in document] for document in documents), columns=48)
    weights = response_weights(LossWeights(text=1.0), vocabulary=VOCABULARY)(batch)[0]
    expected = [learned for document in documents for learned in learned_by_reading(document)]
    assert (weights > 0).tolist() == expected + [False] * (48 - len(expected))
