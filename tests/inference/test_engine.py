"""The engine against the plain way: one sequence, the whole prefix through the model each time."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tiny_engine import (
    SMALL,
    TOKENIZER,
    V,
    build,
    full_logits,
    generate,
    mixed_requests,
    model,
    picture_request,
    plain_generate,
    sampling,
    text_request,
)

from emu35.errors import ConfigError, QueueFull
from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize, NextKind
from emu35.inference.request import Finish


def test_engine_equals_the_plain_way() -> None:
    free = GrammarOptions(open_image=True, min_digits=1)
    requests = [
        *mixed_requests(),
        *(picture_request("free", seed=seed, grammar=free, max_new_tokens=60) for seed in range(9)),
    ]
    expected = [plain_generate(request) for request in requests]
    assert [answer.ids for answer in generate(requests, at_once=14)] == expected


@pytest.mark.parametrize(("at_once", "chunk"), [(1, 256), (2, 5), (3, 1), (64, 256)])
def test_answers_do_not_depend_on_batch_or_chunk(at_once: int, chunk: int) -> None:
    """Few at a time make requests wait and take over the slots of others."""
    requests = mixed_requests()
    expected = [answer.ids for answer in generate(requests, at_once=14)]
    assert [answer.ids for answer in generate(requests, at_once=at_once, chunk=chunk)] == expected


def test_a_picture_comes_out_as_a_document() -> None:
    (answer,) = generate([picture_request("a cat")], at_once=2)
    assert answer.finish is Finish.images
    assert [codes.shape for codes in answer.document.images] == [(2, 3)]
    assert len(answer.ids) == SMALL.image_tokens
    assert not answer.document.problems


def test_an_image_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image of 2\*3 codes has 13 tokens.*max_new_tokens=9"):
        generate([picture_request("a cat", max_new_tokens=9)], at_once=2)


def test_guidance_changes_the_picture_and_the_unconditional_prompt_matters() -> None:
    base = picture_request("a cat", visual=sampling(temperature=0), guidance=4.0)
    other = picture_request(
        "a cat", visual=sampling(temperature=0), guidance=4.0, unconditional=[V.bos, *b"dog"]
    )
    plain = picture_request("a cat", visual=sampling(temperature=0), guidance=1.0)
    answers = generate([base, other, plain], at_once=8)
    assert len({tuple(answer.ids) for answer in answers}) == 3


def test_seeds_decide() -> None:
    same, again, other = (
        answer.ids
        for answer in generate([picture_request("a", seed=s) for s in (7, 7, 8)], at_once=6)
    )
    assert same == again != other


def test_stories_repeat_the_size_of_their_first_image() -> None:
    stories = [
        picture_request(
            "story",
            grammar=GrammarOptions(open_image=True, min_digits=1),
            max_images=0,
            guidance=1.0,
            max_new_tokens=400,
            seed=seed,
        )
        for seed in range(24)
    ]
    shapes = [
        [codes.shape for codes in answer.document.images]
        for answer in generate(stories, at_once=24)
    ]
    assert any(len(sizes) > 1 for sizes in shapes), "no story has a second image"
    assert all(len(set(sizes)) == 1 for sizes in shapes)


def test_an_engine_can_be_used_again() -> None:
    requests = mixed_requests()
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_requests=14, max_length=200)
    for request in requests:
        engine.submit(request)
    first = engine.run()
    for request in requests:
        engine.submit(request)
    second = engine.run()
    assert [a.ids for a in first] == [a.ids for a in second]
    assert [a.index for a in second] == list(range(len(requests), 2 * len(requests)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt has no tokens"),
        ({"unconditional": ()}, "needs an unconditional prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 10_000}, "exceed the engine's length"),
        ({"visual": sampling(top_p=0)}, "image top-p"),
        ({"visual": sampling(temperature=1e-30)}, r"image temperature 1e-30 .* \[0.001, 1000\]"),
        ({"guidance": 1e39}, "guidance=1e\\+39 must lie in"),
        ({"seed": 2**63}, "must fit 64 bits"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"top_logprobs": 99}, "top_logprobs=99 must be at most 20"),
        ({"grammar": GrammarOptions(size=GridSize(height=0, width=2))}, r"image of 0\*2 codes"),
        ({"grammar": GrammarOptions(min_digits=3)}, "min_digits=3 must lie in"),
        ({"prompt": [V.size]}, "outside the vocabulary"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, object], message: str) -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_requests=4, max_length=100)
    with pytest.raises(ConfigError, match=message):
        engine.submit(picture_request("a cat", **changes))
    assert not engine.busy


def test_distributions_of_the_tiny_model_are_not_flat() -> None:
    """The comparisons above would prove little if every prefix gave the same logits."""
    prompts: list[Callable[[], torch.Tensor]] = [
        lambda: full_logits([V.bos, *b"one"]),
        lambda: full_logits([V.bos, *b"another"]),
    ]
    one, another = (prompt().log_softmax(-1) for prompt in prompts)
    assert (one - another).abs().max() > 0.5


def test_forced_tokens_cost_neither_a_forward_nor_a_projection() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=100)
    engine.submit(picture_request("a cat"))
    (answer,) = engine.run()
    forced = [token for token in answer.tokens if token.forced]
    # BOI, "2*3", IMG, one EOL and EOI; the six codes are drawn.
    assert len(forced) == 7
    assert engine.stats.projected_visual == 6
    assert engine.stats.projected_text == engine.stats.projected_digits == 0
    # The prompt and the header are one forward that yields the first code, the rest one each.
    assert engine.stats.forwards == 6
    assert engine.stats.tokens_generated == len(answer.ids)
    assert engine.stats.forced == 7


def test_a_text_token_projects_no_visual_id() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200)
    request = text_request("prose", grammar=GrammarOptions(images=False), max_images=0)
    engine.submit(request)
    (answer,) = engine.run()
    assert engine.stats.projected_text == len(answer.ids) > 0
    assert engine.stats.projected_visual == 0


def test_text_only_requests_have_no_second_stream_and_no_image() -> None:
    prompts = [
        text_request(f"prose {n}", grammar=GrammarOptions(images=False), max_images=0, seed=n)
        for n in range(20)
    ]
    engine = Engine(
        model=model(), tokenizer=TOKENIZER, max_length=200, cache_tokens=640, max_requests=20
    )
    for request in prompts:
        engine.submit(request)
    for answer in engine.run():
        assert not set(answer.ids) & {V.boi, V.img, V.eoi, V.eol}
        assert answer.document.images == []


def test_updates_add_up_to_the_answer() -> None:
    requests = mixed_requests()
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200, max_requests=3)
    indices = [engine.submit(request) for request in requests]
    seen: dict[int, list[int]] = {index: [] for index in indices}
    answers = {}
    while engine.busy:
        for update in engine.step():
            assert update.index not in answers, "an update behind the last one"
            seen[update.index] += [token.id for token in update.tokens]
            if update.finished:
                answers[update.index] = update.finished
    assert seen == {index: answers[index].ids for index in indices}


def test_a_stream_yields_token_by_token_and_frees_its_place_when_left() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200)
    request = picture_request("a cat")
    whole = [token.id for update in engine.stream(request) for token in update.tokens]
    assert whole == generate([request], at_once=1)[0].ids
    for update in engine.stream(request):
        assert update.tokens
        break
    assert not engine.busy
    assert engine.stats.cache_used == 0


def test_a_stop_string_ends_the_text() -> None:
    # The answer to this request, so that what it says is known to come.
    request = text_request(
        "prose", grammar=GrammarOptions(images=False), max_images=0, max_new_tokens=60, seed=4
    )
    (free,) = generate([request], at_once=1)
    text = next(part for part in free.document.texts if len(part) > 3)
    word = text[1:3]
    stopped = text_request(
        "prose",
        grammar=GrammarOptions(images=False),
        max_images=0,
        max_new_tokens=60,
        seed=4,
        stop=("never said", word),
    )
    (answer,) = generate([stopped], at_once=1)
    assert answer.finish is Finish.stop
    assert answer.document.texts[-1].endswith(word)
    assert free.ids[: len(answer.ids)] == answer.ids


def test_a_request_ends_behind_its_last_image() -> None:
    options = GrammarOptions(open_image=True, size=GridSize(height=1, width=2))
    requests = [
        picture_request(
            "story", grammar=options, max_images=2, max_new_tokens=400, guidance=1.0, seed=seed
        )
        for seed in range(12)
    ]
    answers = generate(requests, at_once=12)
    ended = [answer for answer in answers if answer.finish is Finish.images]
    assert ended, "no request has come to its second image"
    for answer in ended:
        assert len(answer.document.images) == 2
        assert answer.ids[-1] == V.eoi


def test_the_waiting_line_has_an_end() -> None:
    engine = Engine(
        model=model(), tokenizer=TOKENIZER, max_length=100, max_requests=2, max_waiting=1
    )
    for _ in range(3):
        engine.submit(picture_request("a cat"))
    with pytest.raises(QueueFull, match="max_waiting=1"):
        engine.submit(picture_request("a dog"))
    assert len(engine.run()) == 3
    engine.submit(picture_request("a dog"))


@pytest.mark.parametrize("word", ["2", "*3", "*"])
def test_the_size_of_an_image_is_no_text_to_stop_at(word: str) -> None:
    (answer,) = generate([picture_request("a cat", stop=(word,))], at_once=1)
    assert answer.finish is Finish.images
    assert not answer.document.problems


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_as_many_requests_run_at_once_as_the_engine_is_made_for(guidance: float) -> None:
    requests = [picture_request("a cat", guidance=guidance, seed=n) for n in range(16)]
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=requests[0].slots)
    for request in requests:
        engine.submit(request)
    engine.step()
    assert engine.stats.active == 16


def test_a_stream_whose_request_is_aborted_ends() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200)
    for update in engine.stream(picture_request("a cat")):
        engine.abort(update.index)
    assert not engine.busy


def test_training_in_between_leaves_no_dropout_behind() -> None:
    request = picture_request("a cat", visual=sampling(temperature=0))
    (expected,) = generate([request], at_once=1)
    dropping = build(hidden_dropout=0.5)
    engine = Engine(model=dropping, tokenizer=TOKENIZER, max_length=200)
    dropping.train()
    engine.submit(request)
    assert engine.run()[0].ids == expected.ids


def test_a_failed_forward_leaves_no_token_unfed(monkeypatch: pytest.MonkeyPatch) -> None:
    request = picture_request("a cat")
    (expected,) = generate([request], at_once=1)
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200)
    engine.submit(request)
    engine.step()

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room for this layer")

    layer = engine.model.decoder.layers[1]
    with layer.register_forward_pre_hook(out_of_memory), pytest.raises(MemoryError):
        engine.step()
    assert engine.run()[0].ids == expected.ids


def test_an_engine_that_is_dropped_gives_its_cache_back_at_once() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200)
    cache = weakref.ref(engine._cache)
    engine.submit(picture_request("a cat"))
    engine.run()
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_what_can_never_fit_the_cache_is_refused() -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=1000, cache_tokens=256)
    with pytest.raises(ConfigError, match=r"640 slots of the cache \(2 streams.*has 256"):
        engine.submit(picture_request("a cat", max_new_tokens=300))


def test_log_probabilities_are_those_of_the_policy() -> None:
    """Replayed the plain way: guidance over the whole vocabulary, mask, temperature, top-k."""
    request = picture_request("a cat", seed=9, visual=sampling(top_k=10, temperature=0.7))
    (answer,) = generate([request], at_once=1)
    seen, unconditional = list(request.prompt), list(request.unconditional)
    for token in answer.tokens:
        if token.kind is NextKind.VISUAL:
            conditional_V = full_logits(seen)[0].log_softmax(-1)
            unconditional_V = full_logits(unconditional)[0].log_softmax(-1)
            guided_V = unconditional_V + request.guidance * (conditional_V - unconditional_V)
            scores_V = guided_V[V.visual_start :] / 0.7
            kept_V = scores_V.masked_fill(scores_V < scores_V.topk(10).values[-1], -torch.inf)
            expected = float(kept_V.log_softmax(-1)[token.id - V.visual_start])
            assert token.logprob == pytest.approx(expected, abs=2e-4)
            assert token.support == 10
        else:
            assert token.forced
            assert (token.logprob, token.support) == (0.0, 1)
        seen.append(token.id)
        unconditional.append(token.id)


def test_top_log_probabilities_are_reported_where_they_are_asked_for() -> None:
    asked = text_request("prose", seed=4, max_images=0, top_logprobs=3, text=sampling(top_k=5))
    silent = text_request("prose", seed=4, max_images=0, text=sampling(top_k=5))
    with_top, without = generate([asked, silent], at_once=2)
    assert with_top.ids == without.ids
    assert not any(token.top for token in without.tokens)
    drawn = [token for token in with_top.tokens if token.kind is NextKind.TEXT]
    assert drawn
    for token in drawn:
        assert len(token.top) == 3
        assert [value for _, value in token.top] == sorted(
            (value for _, value in token.top), reverse=True
        )
        assert token.logprob <= token.top[0][1] + 1e-6
