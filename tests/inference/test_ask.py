"""A user's wish as a request: what the task leaves, what is fixed, what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from emu35.config import TokenizerConfig, TokenizerKind
from emu35.errors import ConfigError
from emu35.inference.ask import (
    MAX_REFERENCES,
    MAX_STOPS,
    Ask,
    SamplingOverride,
    Turn,
    build_request,
)
from emu35.inference.grammar import GridSize
from emu35.inference.request import Request
from emu35.tokens.serialize import image_tokens
from emu35.tokens.template import TASKS, PromptTemplate, Task, build_prompt
from emu35.tokens.text import build_text_tokenizer

TOKENIZER = build_text_tokenizer(TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=16))
V = TOKENIZER.vocabulary
RED = np.arange(6).reshape(2, 3)
TALL = np.arange(8).reshape(4, 2)


def ask(task: Task = Task.t2i, **changes: Any) -> Ask:
    return replace(Ask(task=task, question="a red cat"), **changes)


def turn(**changes: Any) -> Turn:
    return replace(Turn(question="q", answer=()), **changes)


def request(
    wish: Ask, *, template: PromptTemplate = PromptTemplate.official, room: int = 40_000
) -> Request:
    return build_request(wish, tokenizer=TOKENIZER, template=template, max_positions=room)


def refused(wish: Ask, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        request(wish, **options)
    return caught.value.problems


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.x2i])
def test_a_task_brings_its_numbers(task: Task) -> None:
    made, numbers = request(ask(task, seed=7)), TASKS[task]
    prompt = build_prompt(task, "a red cat", tokenizer=TOKENIZER)
    assert (made.prompt, made.unconditional) == (prompt.conditional, prompt.unconditional)
    assert (made.text, made.visual, made.guidance) == (
        numbers.text,
        numbers.image,
        numbers.guidance,
    )
    assert (made.max_new_tokens, made.seed) == (numbers.max_new_tokens, 7)
    assert made.max_images == (1 if numbers.one_image else 0)
    assert made.grammar.images == (task is not Task.chat)
    assert made.grammar.size is None


def test_what_is_given_takes_the_place_of_the_tasks_number() -> None:
    wish = ask(
        Task.story,
        guidance=1.5,
        text=SamplingOverride(temperature=0.0),
        visual=SamplingOverride(top_k=3, top_p=0.5),
        max_new_tokens=99,
        stop=("END",),
        top_logprobs=2,
    )
    made, numbers = request(wish), TASKS[Task.story]
    assert (made.text.temperature, made.text.top_k) == (0.0, numbers.text.top_k)
    assert (made.visual.temperature, made.visual.top_k, made.visual.top_p) == (1.0, 3, 0.5)
    assert (made.guidance, made.max_new_tokens) == (1.5, 99)
    assert (made.stop, made.top_logprobs) == (("END",), 2)


def test_several_references_come_first_and_the_last_one_gives_the_size() -> None:
    made = request(ask(Task.x2i, images=(RED, TALL)))
    prompt = build_prompt(Task.x2i, "a red cat", images=[RED, TALL], tokenizer=TOKENIZER)
    assert made.prompt == prompt.conditional
    assert made.grammar.size == GridSize(height=4, width=2)


def test_any_to_image_may_be_asked_without_references() -> None:
    """It is trained so as well, and the official template has a form of its own for it."""
    made = request(ask(Task.x2i))
    assert made.prompt == build_prompt(Task.x2i, "a red cat", tokenizer=TOKENIZER).conditional
    assert "x2i task. USER: a red cat ASSISTANT: " in TOKENIZER.decode(made.prompt)
    assert (made.guidance, made.max_images) == (TASKS[Task.x2i].guidance, 1)
    assert made.grammar.size is None


def test_the_size_is_the_wished_one_then_that_of_the_latest_picture() -> None:
    drawn = (*b"look", *image_tokens(TALL, TOKENIZER), V.ess, V.eos)
    only_text = Turn(question="and?", answer=(*b"fine", V.ess))
    seen = (Turn(question="q", answer=drawn, images=(RED,)), only_text)

    def size(**changes: Any) -> GridSize | None:
        return request(ask(Task.explore, **changes)).grammar.size

    assert size(earlier=seen) == GridSize(height=4, width=2)
    assert size(earlier=(Turn(question="q", answer=(*b"no",), images=(RED,)),)) == GridSize(
        height=2, width=3
    )
    assert size(earlier=seen, images=(RED,)) == GridSize(height=2, width=3)
    assert size(earlier=seen, ratio="16:9") == GridSize(height=47, width=85)
    assert size(earlier=seen, ratio="auto") is None
    assert size(earlier=(only_text,)) is None
    exact = GridSize(height=5, width=6)
    assert size(earlier=seen, images=(RED,), size=exact) == exact


def test_steps_are_the_images_after_which_an_answer_ends() -> None:
    assert request(ask(Task.explore, steps=5)).max_images == 5
    assert request(ask(Task.story)).max_images == 0
    assert request(ask(Task.t2i, steps=1)).max_images == 1
    (problem,) = refused(ask(Task.t2i, steps=2))
    assert "steps=2, but task t2i is one image; use story" in problem


@pytest.mark.parametrize(
    "wish", [{"size": GridSize(height=3, width=3)}, {"ratio": "1:1"}, {"steps": 1}]
)
def test_a_chat_draws_only_when_pictures_are_asked_for(wish: dict[str, Any]) -> None:
    assert not request(ask(Task.chat)).grammar.images
    # A picture that is shown asks for none.
    shown = request(ask(Task.chat, images=(RED,)))
    assert not shown.grammar.images
    assert shown.grammar.size is None
    assert request(ask(Task.chat, max_new_tokens=9000, **wish)).grammar.images


def test_a_plain_prompt_opens_the_image_and_ends_with_it() -> None:
    plain = PromptTemplate.plain
    made = request(ask(size=GridSize(height=3, width=4)), template=plain)
    assert (made.grammar.open_image, made.grammar.min_digits) == (True, 1)
    assert made.max_new_tokens == GridSize(height=3, width=4).image_tokens
    story = request(ask(Task.story), template=plain)
    assert (story.grammar.open_image, story.grammar.min_digits) == (False, 1)
    official = request(ask())
    assert (official.grammar.open_image, official.grammar.min_digits) == (False, 2)


def test_an_answer_fits_the_positions_that_the_prompt_leaves() -> None:
    length = len(request(ask(Task.chat)).prompt)
    assert request(ask(Task.chat), room=length + 10).max_new_tokens == 10
    (problem,) = refused(ask(Task.chat), room=length)
    assert "leaves 0 of the model's positions, but an answer needs 1" in problem
    (problem,) = refused(ask(Task.chat, max_new_tokens=11), room=length + 10)
    assert "leaves 10 of the model's positions, but max_new_tokens needs 11" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " \n"}, "the prompt is empty"),
        ({"images": (RED,) * (MAX_REFERENCES + 1)}, f"takes at most {MAX_REFERENCES}"),
        (
            {
                "images": (RED,),
                "earlier": (Turn(question="q", answer=(), images=(RED,) * MAX_REFERENCES),),
            },
            f"takes at most {MAX_REFERENCES}",
        ),
        ({"images": (RED, RED + 14)}, "reference image 1: code 19 lies outside the codebook"),
        ({"images": (np.zeros((0, 3), int),)}, "reference image 0: .*at least 1 x 1"),
        ({"images": (np.zeros((2, 3)),)}, "reference image 0: .*must be integers"),
        (
            {"earlier": (turn(answer=(V.size,)),)},
            "turn 0, answer: id 483 lies outside",
        ),
        (
            {"earlier": (turn(images=(RED + 14,)),)},
            "turn 0, reference image 0: code 19 lies outside",
        ),
        ({"ratio": "7:5"}, "'7:5' is unknown; use one of 4:3"),
        ({"ratio": "1:1", "size": GridSize(height=3, width=3)}, "give one of them"),
        ({"size": GridSize(height=0, width=3)}, r"size 0\*3 is no grid"),
        ({"size": GridSize(height=80, width=80)}, "has 6487 tokens, but only 5120"),
        (
            {"task": Task.story, "steps": 9, "size": GridSize(height=64, width=64)},
            "9 images of 64.64 codes have 37503 tokens, but only 32768 .* fewer steps",
        ),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"guidance": 1e9}, "guidance=1000000000.0 must lie in .*; 1 turns it off"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808 must lie in"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        ({"steps": 0}, "steps=0 is too small"),
        ({"text": SamplingOverride(temperature=-1.0)}, "text temperature -1.0"),
        ({"visual": SamplingOverride(top_p=0.0)}, "image top-p 0.0"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop": ("x",) * (MAX_STOPS + 1)}, f"at most {MAX_STOPS}"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
    ],
)
def test_what_is_refused_is_named_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        request(ask(**changes))
    assert len(caught.value.problems) == 1


def test_all_problems_are_named_together() -> None:
    found = refused(ask(question="", ratio="x", seed=-1, images=(RED + 14,)))
    assert len(found) == 4
