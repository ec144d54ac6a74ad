"""The contract between sampler and trainer: what was drawn is replayed with the same numbers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_engine import TOKENIZER, V, generate, model, picture_request, sampling, text_request

from emu35.errors import DataError
from emu35.inference.grammar import GrammarOptions, SizeIds
from emu35.inference.request import Finish, Request
from emu35.inference.sampler import guide_hidden
from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask
from emu35.model.policy import policy_logprobs
from emu35.stages.grpo.replay import legal_sets
from emu35.stages.grpo.rollouts import rollout_of
from emu35.stages.grpo.rows import Learned, PolicyBatch, lay_out
from emu35.stages.grpo.types import Rollout, TokenKind

FREE = GrammarOptions(open_image=True, min_digits=1)


def requests() -> list[Request]:
    """Pictures and prose, guided or not, whole legal sets and parts of them, free sizes."""
    kept = {"keep_candidates": True}
    return [
        picture_request("plain", seed=1, guidance=1.0, visual=sampling(), unconditional=(), **kept),
        picture_request("top-k", seed=2, guidance=1.0, unconditional=(), **kept),
        picture_request("guided", seed=3, visual=sampling(temperature=1.3), **kept),
        picture_request("guided, top-p", seed=4, visual=sampling(top_p=0.8, top_k=30), **kept),
        picture_request("free size", seed=5, grammar=FREE, max_new_tokens=60, **kept),
        text_request(
            "prose", seed=6, max_images=0, text=sampling(top_p=0.9, temperature=0.7), **kept
        ),
        text_request("more prose", seed=7, max_images=0, guidance=1.0, max_new_tokens=30, **kept),
    ]


def drawn() -> list[Rollout]:
    asked = requests()
    answers = generate(asked, at_once=16)
    return [
        rollout_of(answer, request=request, step=1)
        for answer, request in zip(answers, asked, strict=True)
    ]


def learned(rollouts: list[Rollout]) -> list[Learned]:
    return [Learned(rollout=rollout, advantage=1.0, weight=1.0) for rollout in rollouts]


def replayed(batch: PolicyBatch) -> torch.Tensor:
    """Log-probabilities [N] of the sampled tokens of ``batch`` by the whole model."""
    context = AttentionContext(
        positions_BS=batch.positions, mask=AttentionMask.causal(batch.document_start)
    )
    with torch.no_grad():
        hidden_SBH = model()(batch.tokens, context=context)
    chosen_N = batch.chosen_N
    hidden_NH = hidden_SBH.flatten(0, 1)[chosen_N]
    rows = batch.tokens.shape[0]
    partner_N = batch.of("partner", chosen_N) * rows + chosen_N % rows
    guided_NH = guide_hidden(
        hidden_NH,
        unconditional_NH=hidden_SBH.flatten(0, 1)[partner_N],
        scale_N1=batch.of("guidance", chosen_N)[:, None],
    )
    return policy_logprobs(
        model(), hidden_NH=hidden_NH, guided_NH=guided_NH, choices=batch.choices(chosen_N)
    ).chosen_N


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_trainer_finds_what_the_engine_said(micro_batch_size: int) -> None:
    """Every sampled token of every kind of request, to 1e-4 nats, however rows are packed."""
    rollouts = drawn()
    batches = lay_out(
        learned(rollouts),
        tokenizer=TOKENIZER,
        sequence_length=160,
        micro_batch_size=micro_batch_size,
    )
    tokens = 0
    for batch in batches:
        found_N = replayed(batch)
        said_N = batch.of("behaviour", batch.chosen_N)
        torch.testing.assert_close(found_N, said_N, rtol=0, atol=1e-4)
        tokens += len(found_N)
    assert tokens == sum(int((~rollout.forced).sum()) for rollout in rollouts)


def test_guidance_is_part_of_the_policy() -> None:
    """Scored without it, the tokens of a guided rollout look like somebody else's."""
    (rollout,) = (r for r in drawn() if bytes(r.prompt_ids[1:].astype(np.uint8)) == b"guided")
    blind = replace(rollout, behaviour=replace(rollout.behaviour, guidance=1.0))
    (batch,) = lay_out(
        learned([blind]), tokenizer=TOKENIZER, sequence_length=160, micro_batch_size=1
    )
    off_N = replayed(batch) - batch.of("behaviour", batch.chosen_N)
    assert float(off_N.abs().mean()) > 0.1


def test_top_k_is_part_of_the_policy() -> None:
    """Scored over all visual ids, a token of 20 candidates looks less likely than it was."""
    (rollout,) = (r for r in drawn() if bytes(r.prompt_ids[1:].astype(np.uint8)) == b"top-k")
    blind = replace(rollout, candidates=())
    (batch,) = lay_out(
        learned([blind]), tokenizer=TOKENIZER, sequence_length=160, micro_batch_size=1
    )
    off_N = replayed(batch) - batch.of("behaviour", batch.chosen_N)
    assert float(off_N.max()) < 1e-4
    assert float(off_N.min()) < -0.01


def test_support_counts_the_candidates() -> None:
    size_ids = SizeIds.of(TOKENIZER)
    for rollout in drawn():
        legal = legal_sets(rollout, vocabulary=V, size_ids=size_ids)
        every = zip(legal.sets, rollout.candidates, rollout.support, strict=True)
        for place, (ranges, kept, support) in enumerate(every):
            whole = sum(end - start for start, end in ranges)
            assert support == (whole if kept is None else len(kept))
            if kept is not None:
                assert rollout.ids[place] in kept
                assert all(any(a <= id < b for a, b in ranges) for id in kept.tolist())


def test_forced_tokens_are_certain_and_left_out() -> None:
    """Ends of rows and of the image, IMG, digits of a known size: ratio 1 by construction."""
    rollouts = drawn()
    for rollout in rollouts:
        assert (rollout.logprobs[rollout.forced] == 0).all()
        assert (rollout.support[rollout.forced] == 1).all()
    assert all(rollout.forced.any() for rollout in rollouts[:5])
    batches = lay_out(
        learned(rollouts), tokenizer=TOKENIZER, sequence_length=160, micro_batch_size=1
    )
    for batch in batches:
        forced_BS = batch.label_valid & ~batch.sampled
        assert (batch.weight[forced_BS] == 0).all()
        assert (batch.behaviour[forced_BS] == 0).all()
        sampled = batch.labels[batch.sampled].tolist()
        assert not set(sampled) & {V.eol, V.eoi}


def test_limits_cut_text_and_no_picture() -> None:
    """An answer whose picture fills its last token is whole; prose that goes on is cut."""

    def answered(request: Request) -> Rollout:
        (answer,) = generate([request], at_once=1)
        return rollout_of(answer, request=request, step=1)

    plain: dict[str, Any] = {"guidance": 1.0, "unconditional": (), "visual": sampling()}
    free = answered(picture_request("one", seed=1, max_images=0, **plain))
    length = 1 + int(np.nonzero(free.ids == V.eoi)[0][0])
    exact = answered(picture_request("one", seed=1, max_images=0, max_new_tokens=length, **plain))
    assert (exact.finish, len(exact.ids)) == (Finish.length, length)
    assert exact.ids[-1] == V.eoi
    assert not exact.truncated
    words = {"grammar": GrammarOptions(images=False), "max_images": 0, "max_new_tokens": 5}
    prose = answered(text_request("prose", seed=4, **words, **plain))
    assert (prose.finish, prose.truncated) == (Finish.length, True)


def test_sizes_that_the_model_chose_are_learned() -> None:
    """The digits of a free size are choices among a few ids, drawn like visual tokens."""
    (rollout,) = (r for r in drawn() if bytes(r.prompt_ids[1:].astype(np.uint8)) == b"free size")
    assert (rollout.kinds == TokenKind.among).sum() >= 2


@pytest.mark.parametrize(
    ("place", "token", "message"),
    [(-1, V.eol, "only legal one"), (5, 3, "not legal there")],
)
def test_a_rollout_that_breaks_the_grammar_is_refused(place: int, token: int, message: str) -> None:
    rollout = drawn()[0]
    ids = rollout.ids.copy()
    ids[place] = token
    with pytest.raises(DataError, match=message):
        lay_out(
            learned([replace(rollout, ids=ids)]),
            tokenizer=TOKENIZER,
            sequence_length=160,
            micro_batch_size=1,
        )


def test_a_rollout_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.sequence_length=20"):
        lay_out(learned(drawn()), tokenizer=TOKENIZER, sequence_length=20, micro_batch_size=1)
