"""Pictures decoded in parallel: against the training mask and the plain cache, alone and mixed."""

from collections.abc import Sequence

import pytest
import torch
from denoise_engine import STEPS, denoise, denoise_engine, denoise_request, denoiser
from dida_batches import copy_logits
from tiny_engine import (
    SMALL,
    TOKENIZER,
    V,
    full_logits,
    generate,
    mixed_requests,
    model,
    sampling,
)

from emu35.config.dida import PathKind
from emu35.dida.samplers import Sampler
from emu35.errors import ConfigError
from emu35.inference.canvas import Canvas
from emu35.inference.engine import Engine
from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, NextKind, SizeIds
from emu35.inference.request import Finish, Request
from emu35.inference.sampler import draw
from emu35.inference.scheduler import Feed, Stream
from emu35.model.cache import CachedForward, KVCache, Span
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits

STORY = GrammarOptions(size=SMALL, open_image=True)


class Recording(Engine):
    """Keeps what every canvas was fed as, behind what, and the hidden states that came of it."""

    def _run(self, feeds: list[Feed]) -> dict[Stream, torch.Tensor]:
        before = [
            (feed.stream, list(feed.stream.tokens[:-1]), feed.canvas.tokens().clone())
            for feed in feeds
            if isinstance(feed.canvas, Canvas)
        ]
        hidden = super()._run(feeds)
        self.seen += [(prefix, ids, hidden[stream].clone()) for stream, prefix, ids in before]
        return hidden

    seen: list[tuple[list[int], torch.Tensor, torch.Tensor]]


def recording(**numbers: int) -> Recording:
    engine = Recording(
        model=model(), tokenizer=TOKENIZER, denoiser=denoiser(), max_length=400, **numbers
    )
    engine.seen = []
    return engine


def stories(count: int = 6) -> list[Request]:
    """Documents of several pictures with text between them, whose sizes differ."""
    return [
        denoise_request(
            "story " * (seed % 3 + 1),
            seed=seed,
            grammar=GrammarOptions(size=GridSize(height=2, width=2 + seed % 3), open_image=True),
            guidance=1.0 if seed % 2 else 3.0,
            guidance_until=0.6 if seed % 4 == 0 else 1.0,
            steps=3 + seed % 3,
            sampler=list(Sampler)[seed % 4],
            max_images=2,
            max_new_tokens=300,
        )
        for seed in range(count)
    ]


def test_the_cached_logits_of_a_canvas_are_those_of_the_training_mask() -> None:
    engine = recording(max_requests=4)
    for request in stories(4):
        engine.submit(request)
    engine.run()
    assert len(engine.seen) > 20
    later = [prefix for prefix, _, _ in engine.seen if V.eoi in prefix]
    assert later, "no story has a second picture"
    for prefix, ids, hidden_LH in engine.seen:
        cached = vocabulary_logits(model(), hidden_NH=hidden_LH)
        expected = copy_logits(model(), prefix=prefix, canvas=ids.tolist(), tokenizer=TOKENIZER)
        assert cached.shape == expected.shape
        torch.testing.assert_close(cached, expected, atol=2e-4, rtol=1e-4)


def prefilled(ids: Sequence[int]) -> KVCache:
    """The cache of one causal forward of ``ids``."""
    config = model().lm_config
    cache = KVCache(
        num_layers=config.num_layers,
        slots=len(ids),
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    context = AttentionContext(
        positions_BS=torch.arange(len(ids))[None],
        cache=CachedForward(cache, spans=[Span(start=0, length=0, count=len(ids))]),
    )
    with torch.inference_mode():
        model()(torch.tensor([list(ids)]), context=context)
    return cache


def test_the_cache_after_a_picture_is_that_of_reading_it() -> None:
    engine = denoise_engine()
    engine.submit(denoise_request("story", grammar=STORY, max_images=0, max_new_tokens=60, seed=1))
    while not engine.stats.images_denoised:
        engine.step()
    forwards = engine.stats.forwards
    engine.step()
    assert engine.stats.forwards == forwards + 1, "one forward commits a picture"
    (sequence,) = engine._scheduler.active
    assert sequence.tokens[-1].kind is NextKind.TEXT, "and yields the next text"
    for stream in sequence.streams:
        assert stream.extent is not None
        ids = stream.tokens[: stream.fed]
        assert ids[-1] == V.eoi
        expected, start = prefilled(ids), stream.extent.start
        held = slice(start, start + stream.fed)
        for found, wanted in (
            (engine._cache.keys_NGLD, expected.keys_NGLD),
            (engine._cache.values_NGLD, expected.values_NGLD),
        ):
            torch.testing.assert_close(found[:, :, held], wanted, atol=1e-4, rtol=1e-4)


def test_a_picture_takes_a_forward_a_step_and_no_more() -> None:
    for guidance in (1.0, 3.0):
        engine = denoise_engine()
        engine.submit(denoise_request("a cat", guidance=guidance))
        (answer,) = engine.run()
        # The prompt goes ahead of the first step in the same forward; nothing is committed.
        assert engine.stats.forwards == STEPS
        assert engine.stats.denoise_steps == STEPS
        assert answer.finish is Finish.images
        assert [codes.shape for codes in answer.document.images] == [(2, 3)]
        assert not answer.document.problems


def test_a_document_takes_a_forward_a_step_one_a_picture_and_one_a_word() -> None:
    for request in stories():
        engine = denoise_engine()
        engine.submit(request)
        (answer,) = engine.run()
        assert request.denoise is not None
        words = sum(token.kind is NextKind.TEXT for token in answer.tokens)
        images = len(answer.document.images)
        assert engine.stats.images_denoised == images
        assert engine.stats.forwards <= words + images * (request.denoise.steps + 1)


@pytest.mark.parametrize("kind", list(PathKind))
@pytest.mark.parametrize("sampler", list(Sampler))
def test_whole_pictures_whatever_the_sampler_and_the_path(sampler: Sampler, kind: PathKind) -> None:
    requests = [denoise_request("a cat", sampler=sampler, seed=seed) for seed in range(3)]
    answers = denoise(requests, kind=kind)
    for answer in answers:
        assert len(answer.ids) == SMALL.image_tokens
        assert not answer.document.problems
        codes = [token for token in answer.tokens if not token.forced]
        assert len(codes) == 6
        assert all(token.denoised and V.is_visual(token.id) for token in codes)
        assert all(token.logprob <= 0 and 1 <= token.support <= V.codebook_size for token in codes)
    assert len({tuple(answer.ids) for answer in answers}) == 3, "seeds decide"


def test_answers_do_not_depend_on_what_else_is_in_flight() -> None:
    """Documents at different steps, with different samplers, and token by token between them."""
    ours, others = stories(), mixed_requests()
    mixed = [request for pair in zip(ours, others, strict=False) for request in pair]
    alone = [denoise([request], max_requests=1)[0].ids for request in ours]
    plain = [answer.ids for answer in generate(others[: len(ours)], at_once=8)]
    expected = [ids for pair in zip(alone, plain, strict=True) for ids in pair]
    assert [answer.ids for answer in denoise(mixed, max_requests=12)] == expected
    assert [answer.ids for answer in denoise(mixed, max_requests=3, prefill_chunk=5)] == expected
    assert [answer.ids for answer in denoise(mixed, max_requests=12, canvas_chunk=1)] == expected


def test_text_around_pictures_is_drawn_token_by_token_and_holds_no_codes() -> None:
    """Replayed the plain way, with the pictures given and no cache."""
    requests = stories(4)
    several = 0
    for request, answer in zip(requests, denoise(requests), strict=True):
        several += len(answer.document.images) > 1
        machine = Grammar(vocabulary=V, size_ids=SizeIds.of(TOKENIZER), options=request.grammar)
        seen = list(request.prompt)
        for place, token in enumerate(answer.tokens):
            step = machine.next(room=request.max_new_tokens - place)
            assert token.id in step
            assert token.denoised == (token.kind is NextKind.VISUAL) == V.is_visual(token.id)
            if token.kind is NextKind.TEXT:
                scores_1V = full_logits(seen)
                scores_1V[:, [id for id in range(V.size) if id not in step]] = -torch.inf
                drawn = draw(
                    scores_1V,
                    sampling=request.text,
                    seeds_N=torch.tensor([request.seed]),
                    positions_N=torch.tensor([place]),
                )
                assert token.id == int(drawn.columns_N)
            machine.accept(token.id)
            seen.append(token.id)
        assert not answer.document.problems
    assert several, "no story has a second picture"


def test_pictures_that_were_pushed_out_go_on_from_their_canvas() -> None:
    size = GridSize(height=9, width=12)
    requests = [
        denoise_request(
            "story " * (seed + 1),
            seed=seed,
            grammar=GrammarOptions(size=None, open_image=True, min_digits=1)
            if seed % 2
            else GrammarOptions(size=size, open_image=True),
            guidance=3.0,
            steps=6,
            max_new_tokens=300,
        )
        for seed in range(6)
    ]
    roomy = [answer.ids for answer in denoise(requests, max_requests=6)]
    engine = denoise_engine(cache_tokens=896, max_requests=6, headroom=0)
    for request in requests:
        engine.submit(request)
    answers: dict[int, list[int]] = {}
    half_done = 0
    while engine.busy:
        answers |= {u.index: u.finished.ids for u in engine.step() if u.finished}
        waiting = [sequence.canvas for sequence in engine._scheduler.waiting]
        half_done += any(canvas is not None and canvas.done for canvas in waiting)
    assert [answers[index] for index in range(len(requests))] == roomy
    assert half_done, "no picture was pushed out between its steps"
    assert engine.stats.cache_used == 0


def test_guidance_ends_where_it_is_told_to() -> None:
    engines = {}
    for until in (0.0, 0.5, 1.0):
        engine = denoise_engine()
        engine.submit(denoise_request("a cat", guidance_until=until))
        (answer,) = engine.run()
        engines[until] = (engine.stats.tokens_fed, answer.ids)
    fed = [tokens for tokens, _ in engines.values()]
    canvas = SMALL.height * (SMALL.width + 1)
    # Of five steps at t = 0, .2, .4, .6, .8 none, three and all look at the second stream.
    assert [fed[1] - fed[0], fed[2] - fed[1]] == [3 * canvas, 2 * canvas]
    assert len({tuple(ids) for _, ids in engines.values()}) > 1


def test_cold_pictures_at_one_step_are_the_likeliest_codes_of_pure_noise() -> None:
    engine = recording()
    request = denoise_request("a cat", steps=1, guidance=1.0, visual=sampling(temperature=0))
    engine.submit(request)
    (answer,) = engine.run()
    ((_, _, hidden_LH),) = engine.seen
    logits = vocabulary_logits(model(), hidden_NH=hidden_LH)[:, V.visual_start :]
    likeliest = [int(row) for at, row in enumerate(logits.argmax(-1)) if (at + 1) % 4]
    assert [int(code) for code in answer.document.images[0].flatten()] == likeliest


def test_a_request_that_this_model_cannot_denoise_is_refused() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=100)
    with pytest.raises(ConfigError, match=r"not adapted.*stage=dida.*decoder ar"):
        engine.submit(denoise_request("a cat"))
    with pytest.raises(ConfigError, match=r"denoise steps=0 must lie in 1\.\.1000"):
        denoise_engine().submit(denoise_request("a cat", steps=0))


def test_an_abort_in_the_middle_leaves_nothing_behind() -> None:
    engine = denoise_engine()
    first = engine.submit(denoise_request("a cat", seed=1))
    engine.submit(denoise_request("a dog", seed=2))
    (alone,) = denoise([denoise_request("a dog", seed=2)])
    engine.step()
    engine.step()
    update = engine.abort(first)
    assert update is not None
    assert update.finished is not None
    assert not update.finished.document.images
    (answer,) = engine.run()
    assert answer.ids == alone.ids
    assert engine.stats.cache_used == 0
