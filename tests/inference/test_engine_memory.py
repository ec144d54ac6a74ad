"""What requests leave behind when they are pushed out, given up, or done: nothing."""

import random
from typing import Any

import pytest
from tiny_engine import TOKENIZER, generate, mixed_requests, model, picture_request, text_request

from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Finish, Request


def tight_engine(**changes: int) -> Engine:
    """Barely enough slots for the longest request: the others push each other out."""
    numbers: dict[str, Any] = {
        "max_length": 800,
        "cache_tokens": 1024,
        "max_requests": 8,
        "headroom": 0,
        **changes,
    }
    return Engine(model=model(), tokenizer=TOKENIZER, **numbers)


def long_requests(count: int) -> list[Request]:
    """Prompts of different lengths, and texts that grow far beyond their first slots."""
    return [
        text_request(
            "prose " * (n % 5 + 1),
            grammar=GrammarOptions(size=GridSize(height=2, width=3)),
            seed=n,
            guidance=1.0 if n % 3 else 2.0,
            max_images=0,
            max_new_tokens=440 if n % 3 == 0 else 700,
        )
        for n in range(count)
    ]


def test_requests_that_were_pushed_out_end_as_if_they_had_not_been() -> None:
    requests = long_requests(12)
    roomy = [answer.ids for answer in generate(requests, at_once=8)]
    engine = tight_engine()
    for request in requests:
        engine.submit(request)
    assert [answer.ids for answer in engine.run()] == roomy
    assert engine.stats.preemptions > 0, "the cache was not tight"
    assert engine.stats.cache_used == 0


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_an_aborted_request_ends_at_once(steps: int) -> None:
    engine = tight_engine(max_requests=1)
    running = engine.submit(picture_request("a cat"))
    waiting = engine.submit(picture_request("a dog"))
    for _ in range(min(steps, 5)):
        engine.step()
    for index in (waiting, running):
        update = engine.abort(index)
        assert update is not None
        assert update.finished is not None
        assert update.finished.finish is Finish.abort
        assert engine.abort(index) is None
    assert not engine.busy
    assert engine.stats.cache_used == 0


def test_the_others_do_not_notice_an_abort() -> None:
    requests = mixed_requests()
    alone = [answer.ids for answer in generate(requests, at_once=8)]
    engine = tight_engine()
    indices = [engine.submit(request) for request in requests]
    engine.step()
    engine.abort(indices[0])
    answers = {answer.index: answer.ids for answer in engine.run()}
    assert [answers[index] for index in indices[1:]] == alone[1:]


@pytest.mark.slow
def test_nothing_is_left_of_a_thousand_requests() -> None:
    """Requests of every kind through a tight cache; a third is given up somewhere on the way."""
    rng = random.Random(0)
    kinds = [*mixed_requests(), *long_requests(6)]
    engine = tight_engine(cache_tokens=1024)
    slots = engine.stats.cache_tokens
    ended: dict[int, Finish] = {}
    open_requests: list[int] = []
    submitted = 0
    while submitted < 1000 or engine.busy:
        while submitted < 1000 and len(open_requests) < 12:
            # Long ones are rare: they are there to push others out.
            request = kinds[rng.randrange(7 if rng.random() < 0.9 else len(kinds))]
            open_requests.append(engine.submit(request))
            submitted += 1
        updates = engine.step()
        if rng.random() < 0.15 and open_requests:
            update = engine.abort(rng.choice(open_requests))
            updates += [update] if update else []
        for update in updates:
            if update.finished:
                assert update.index not in ended
                ended[update.index] = update.finished.finish
                open_requests.remove(update.index)
        assert engine.stats.cache_used <= slots
    assert len(ended) == 1000
    assert set(ended.values()) >= {Finish.abort, Finish.images, Finish.length}
    stats = engine.stats
    assert (stats.cache_used, stats.active, stats.waiting) == (0, 0, 0)
    assert stats.preemptions > 0
    # The engine is as good as new: the same answers in the same places.
    requests = mixed_requests()
    for request in requests:
        engine.submit(request)
    assert [a.ids for a in engine.run()] == [a.ids for a in generate(requests, at_once=8)]
