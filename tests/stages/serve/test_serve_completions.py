"""``/v1/completions`` through OpenAI's own client, against a real server of a tiny model."""

import base64
import io
import math
from typing import Any

import pytest
from PIL import Image

from emu35.tokens.serialize import deserialize, image_tokens

IMAGE = [[1, 2, 3], [4, 5, 6]]


def complete(server, prompt: Any = "fruit", **fields: Any) -> Any:
    """A completion's body, with the fields that OpenAI's client does not know."""
    known = {"max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "stream"}
    extra = {name: value for name, value in fields.items() if name not in known}
    given = {name: value for name, value in fields.items() if name in known}
    return server.client.completions.create(
        model="tiny", prompt=prompt, extra_body=extra, **{"max_tokens": 24, **given}
    )


def test_every_form_of_a_prompt(server) -> None:
    tokenizer = server.service.asker.tokenizer
    ids = [tokenizer.vocabulary.bos, *tokenizer.encode("fruit")]
    answers = [
        complete(server, prompt, seed=4, return_token_ids=True)
        for prompt in ("fruit", ids, ["fruit"], [ids])
    ]
    # A string is BOS and the text, whichever way it is written.
    assert len({tuple(a.choices[0].token_ids) for a in answers}) == 1
    assert answers[0].choices[0].prompt_token_ids == ids
    assert answers[0].usage.prompt_tokens == len(ids)
    two = complete(server, ["fruit", "other"], n=2, seed=4, return_token_ids=True)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert len({tuple(choice.token_ids) for choice in two.choices}) == 4
    assert two.choices[0].token_ids == answers[0].choices[0].token_ids


def test_the_seed_decides_and_is_told(server) -> None:
    first = complete(server, seed=9)
    assert first.seed == 9
    assert complete(server, seed=9).choices[0].text == first.choices[0].text
    random = complete(server, return_token_ids=True)
    again = complete(server, seed=random.seed, return_token_ids=True)
    assert again.choices[0].token_ids == random.choices[0].token_ids


def test_logprobs_are_those_of_the_policy(server) -> None:
    answer = complete(server, seed=1, logprobs=3, max_tokens=60, return_token_ids=True)
    choice = answer.choices[0]
    found = choice.logprobs
    assert found.token_ids == choice.token_ids
    vocabulary = server.service.asker.tokenizer.vocabulary
    sampled = 0
    for at, id in enumerate(found.token_ids):
        if found.forced[at]:
            assert found.token_logprobs[at] == 0.0
            assert found.support[at] == 1
            continue
        sampled += 1
        assert found.token_logprobs[at] < 0
        assert len(found.top_logprobs[at]) <= 3
        mass = sum(math.exp(value) for value in found.top_logprobs[at].values())
        assert 0 < mass <= 1 + 1e-5
        if vocabulary.is_visual(id):
            assert found.support[at] == vocabulary.codebook_size
    assert sampled > 0
    assert any(found.forced), "pick another seed: this answer has no picture"
    # Where fewer candidates are left than asked for, there are fewer rivals.
    narrow = complete(server, top_k=1, logprobs=3, max_tokens=4, max_images=0)
    assert {len(top) for top in narrow.choices[0].logprobs.top_logprobs} == {1}
    assert set(narrow.choices[0].logprobs.token_logprobs) == {0.0}
    # Greedy: the best candidate is the one that comes.
    greedy = complete(server, temperature=0, logprobs=1, max_tokens=4, max_images=0)
    assert [list(top) for top in greedy.choices[0].logprobs.top_logprobs] == [
        [token] for token in greedy.choices[0].logprobs.tokens
    ]


def test_a_stream_gives_what_the_whole_answer_has(server) -> None:
    fields = {"seed": 1, "max_tokens": 80, "logprobs": 1, "return_token_ids": True, "n": 2}
    whole = complete(server, **fields)
    texts, ids, values, ends = ["", ""], [[], []], [[], []], [None, None]
    for chunk in complete(server, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ids[choice.index] += getattr(choice, "token_ids", None) or []
            if choice.logprobs:
                values[choice.index] += choice.logprobs.token_logprobs
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    for at, choice in enumerate(whole.choices):
        assert texts[at] == choice.text
        assert ids[at] == choice.token_ids
        assert ends[at] == choice.finish_reason
        assert values[at] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)


def test_stop_strings_end_the_text_and_are_not_in_it(server) -> None:
    plain = complete(server, seed=3, max_tokens=60, max_images=0)
    text = plain.choices[0].text
    stop = text[5:7]
    cut = complete(server, seed=3, max_tokens=60, max_images=0, stop=[stop, "never this"])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].text
        for chunk in complete(server, seed=3, max_tokens=60, max_images=0, stop=[stop], stream=True)
    )
    assert streamed == cut.choices[0].text


def test_pictures_of_a_completion(server) -> None:
    answer = complete(server, task="t2i", size="3x5", seed=2, max_tokens=None, guidance=3.0)
    (part,) = answer.choices[0].parts
    assert part["size"] == "3*5"
    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (10, 6)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.visual_tokens == 15
    bare = complete(server, task="t2i", size="3x5", seed=2, max_tokens=None, return_images=False)
    assert not hasattr(bare.choices[0], "parts")


def test_pictures_of_a_completion_may_be_decoded_in_parallel(server) -> None:
    asked = {"task": "t2i", "size": "3x5", "seed": 2, "max_tokens": None, "guidance": 3.0}
    chosen = {"decoder": "dida", "denoise_steps": 4, "sampler": "maskgit", "return_token_ids": True}
    answer = complete(server, **asked, **chosen)
    (part,) = answer.choices[0].parts
    assert part["size"] == "3*5"
    again = complete(server, **asked, **chosen)
    assert again.choices[0].token_ids == answer.choices[0].token_ids
    plain = complete(server, **asked, return_token_ids=True)
    assert plain.choices[0].token_ids != answer.choices[0].token_ids
    images = server.service.engine.stats.images_denoised
    assert images >= 2
    # All rows come at once: there is nothing to preview.
    parts = [
        part
        for chunk in complete(server, **asked, **chosen, stream=True, stream_previews=1)
        for choice in chunk.choices
        for part in getattr(choice, "parts", None) or []
    ]
    assert [part["type"] for part in parts].count("image_url") == 1
    assert not [part for part in parts if "preview" in part]


def test_a_call_says_how_steps_are_spread_and_how_long_they_are_guided(server) -> None:
    asked = {"task": "t2i", "size": "3x5", "seed": 2, "max_tokens": None, "return_token_ids": True}
    asked |= {"decoder": "dida", "denoise_steps": 6, "return_images": False}

    def ids(**chosen: Any) -> tuple[int, ...]:
        return tuple(complete(server, **asked, **chosen).choices[0].token_ids)

    guided, plain = ids(guidance=200.0), ids(guidance=1.0)
    assert guided != plain
    assert ids(guidance=200.0, guidance_until=0) == plain
    assert ids(guidance=200.0, denoise_shift=5) not in (guided, plain)


def test_ids_with_images_are_prompts_and_answers_are_whole(server) -> None:
    tokenizer = server.service.asker.tokenizer
    vocabulary = tokenizer.vocabulary
    prompt = [vocabulary.bos, *image_tokens(IMAGE, tokenizer)]
    answer = complete(
        server,
        prompt,
        seed=5,
        max_tokens=240,
        size="2x3",
        guidance=2.0,
        unconditional_prompt=[vocabulary.bos],
        image_sampling={"temperature": 0.5, "top_k": 8},
        max_images=2,
        return_token_ids=True,
    )
    ids = answer.choices[0].token_ids
    document = deserialize(ids, tokenizer)
    assert document.problems == []
    assert len(document.images) == 2
    assert ids[-1] == vocabulary.eoi


def test_text_alone(server) -> None:
    vocabulary = server.service.asker.tokenizer.vocabulary
    answer = complete(server, seed=5, max_tokens=100, max_images=0, return_token_ids=True)
    assert vocabulary.boi not in answer.choices[0].token_ids
    assert answer.usage.completion_tokens_details.visual_tokens == 0


def test_a_task_takes_a_string_as_its_question(server) -> None:
    tokenizer = server.service.asker.tokenizer
    answer = complete(
        server, "a fox", task="t2i", size="2x2", max_tokens=None, return_token_ids=True
    )
    choice = answer.choices[0]
    # The tiny model was trained on plain prompts: BOS, the question, and a picture at once.
    assert choice.prompt_token_ids == [tokenizer.vocabulary.bos, *tokenizer.encode("a fox")]
    assert choice.token_ids[0] == tokenizer.vocabulary.boi
