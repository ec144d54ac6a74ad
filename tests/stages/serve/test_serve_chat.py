"""``/v1/chat/completions`` through OpenAI's own client, against a real server of a tiny model."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from emu35.inference.grammar import NextKind
from emu35.inference.progress import Event, ImageDone, ImageProgress, TextPiece, ThoughtPiece
from emu35.inference.request import Finish, Generated, Token, Update
from emu35.stages.serve.answering import Answering
from emu35.stages.serve.pieces import Pieces
from emu35.tokens.serialize import deserialize, image_tokens


def data_url(values: np.ndarray, *, format: str = "PNG") -> str:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, format=format)
    content = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{content}"


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(url: str) -> Image.Image:
    assert url.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(server, content: Any = "once", *, messages: Any = None, **fields: Any) -> Any:
    known = {"max_tokens", "temperature", "n", "seed", "stop", "logprobs", "top_logprobs"}
    known |= {"stream", "stream_options"}
    extra = {name: value for name, value in fields.items() if name not in known}
    given = {name: value for name, value in fields.items() if name in known}
    return server.client.chat.completions.create(
        model="tiny",
        messages=messages or [{"role": "user", "content": content}],
        extra_body=extra,
        **given,
    )


def test_chat_answers_in_text_unless_asked_for_pictures(server) -> None:
    answer = chat(server, max_tokens=60, seed=1, return_token_ids=True)
    message = answer.choices[0].message
    assert isinstance(message.content, str)
    assert message.role == "assistant"
    vocabulary = server.service.asker.tokenizer.vocabulary
    assert vocabulary.boi not in answer.choices[0].token_ids
    drawn = chat(server, max_tokens=100, seed=1, max_images=1, size="2x2")
    assert [part["type"] for part in drawn.choices[0].message.content].count("image_url") == 1


def test_a_picture_is_the_answers_codes(server) -> None:
    answer = chat(server, "a fox", task="t2i", size="4x6", seed=3, return_token_ids=True)
    (part,) = answer.choices[0].message.content
    assert (part["type"], part["size"], part["number"]) == ("image_url", "4*6", 0)
    assert picture(part["image_url"]["url"]).size == (12, 8)
    (codes_HW,) = deserialize(answer.choices[0].token_ids, server.service.asker.tokenizer).images
    assert codes_HW.shape == (4, 6)
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_that_is_no_stream_keeps_no_rows(server, monkeypatch) -> None:
    kept: list[type[Event]] = []
    answer = Answering._answer

    async def spy(self: Answering, *arguments: Any, events: Sequence[Event]) -> Any:
        kept.extend(map(type, events))
        return await answer(self, *arguments, events=events)

    monkeypatch.setattr(Answering, "_answer", spy)
    chat(server, "a fox", task="t2i", size="4x6", seed=3)
    assert ImageDone in kept
    assert ImageProgress not in kept


def test_a_stream_shows_text_rows_previews_and_pictures_in_order(server) -> None:
    fields: dict[str, Any] = {"task": "story", "size": "6x4", "seed": 1, "max_tokens": 100}
    whole = chat(server, **fields)
    expected = [
        ("text", part["text"]) if part["type"] == "text" else ("image", part["image_url"]["url"])
        for part in whole.choices[0].message.content
    ]
    got: list[tuple[str, str]] = []
    rows: dict[int, list[int]] = {}
    previews: list[tuple[int, int]] = []
    usage = finish = None
    for chunk in chat(
        server, **fields, stream=True, stream_previews=2, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                if got and got[-1][0] == "text":
                    got[-1] = ("text", got[-1][1] + choice.delta.content)
                else:
                    got.append(("text", choice.delta.content))
            for part in getattr(choice.delta, "parts", None) or []:
                if part["type"] == "image_url":
                    got.append(("image", part["image_url"]["url"]))
                    continue
                rows.setdefault(part["number"], []).append(part["rows_done"])
                assert part["rows"] == 6
                if "preview" in part:
                    width, height = picture(part["preview"]).size
                    assert (width, height) == (8, 2 * part["rows_done"])
                    previews.append((part["number"], part["rows_done"]))
    assert got == expected
    assert finish == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert rows, "pick another seed: this story has no picture"
    assert all(done == sorted(set(done)) for done in rows.values())
    assert previews


def test_references_become_part_of_the_prompt(server) -> None:
    tokenizer = server.service.asker.tokenizer
    content = [{"type": "text", "text": "bluer"}, image_part(data_url(noise(6, 10)))]
    answer = chat(server, content, task="x2i", image_area=60, seed=1, return_token_ids=True)
    (codes_HW,) = deserialize(answer.choices[0].prompt_token_ids, tokenizer).images
    assert codes_HW.shape == (3, 5)
    # The answer is as large as the last reference.
    assert answer.choices[0].message.content[0]["size"] == "3*5"
    other = chat(
        server, [content[0], image_part(data_url(noise(6, 10, seed=1)))], task="x2i",
        image_area=60, seed=1, return_token_ids=True,
    )  # fmt: skip
    assert other.choices[0].prompt_token_ids != answer.choices[0].prompt_token_ids


def test_a_large_reference_is_fitted_to_the_model(server) -> None:
    answer = chat(server, [image_part(data_url(noise(700, 500), format="JPEG")),
                           {"type": "text", "text": "what is it?"}], max_tokens=8)  # fmt: skip
    assert answer.usage.prompt_tokens < 300


def test_earlier_turns_come_back_as_they_were(server) -> None:
    tokenizer = server.service.asker.tokenizer
    first = chat(server, "a fox", task="t2i", size="3x3", seed=3, return_token_ids=True)
    ids = first.choices[0].token_ids
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and a hen"},
    ]
    as_picture = chat(server, messages=turns, max_tokens=4, return_token_ids=True)
    turns[2] = {"role": "assistant", "token_ids": ids}
    as_ids = chat(server, messages=turns, max_tokens=4, return_token_ids=True)
    # The picture that this server made is these codes again, although pixels were sent.
    assert as_picture.choices[0].prompt_token_ids == as_ids.choices[0].prompt_token_ids
    prompt = as_ids.choices[0].prompt_token_ids
    (codes_HW,) = deserialize(ids, tokenizer).images
    text = tokenizer.decode(prompt)
    assert (
        image_tokens(codes_HW, tokenizer)
        == prompt[prompt.index(tokenizer.vocabulary.boi) :][
            : len(image_tokens(codes_HW, tokenizer))
        ]
    )
    assert text.index("Be brief.") < text.index("a fox") < text.index("and a hen")


def test_logprobs_of_a_chat(server) -> None:
    answer = chat(server, max_tokens=12, seed=2, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert entry.forced or (entry.logprob < 0 and len(entry.top_logprobs) == 2)


def test_choices_differ_and_are_reproducible(server) -> None:
    first = chat(server, n=3, seed=8, max_tokens=20)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [c.message.content for c in chat(server, n=3, seed=8, max_tokens=20).choices] == texts
    assert first.usage.prompt_tokens == chat(server, seed=8, max_tokens=20).usage.prompt_tokens


def updates(tokenizer, ids: list[int], *, at_once: int, finish: Finish) -> list[Update]:
    """``ids`` as the engine would hand them over."""
    tokens = [Token(id=id, kind=NextKind.TEXT) for id in ids]
    done = Generated(index=0, tokens=tokens, document=deserialize(ids, tokenizer), finish=finish)
    parts = [tokens[at : at + at_once] for at in range(0, len(tokens), at_once)]
    return [
        Update(index=0, tokens=part, finished=done if at == len(parts) - 1 else None)
        for at, part in enumerate(parts)
    ]


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two END three", ("END",), "one two "),
        ("an EN and an E", ("END",), "an EN and an E"),
        ("aab", ("ab", "b"), "a"),
        ("caf\u00e9 no", ("\u00e9",), "caf"),
        ("no stop", (), "no stop"),
    ],
)
def test_stop_strings_are_cut_off_however_text_arrives(
    server, at_once: int, text: str, stop: tuple[str, ...], shown: str
) -> None:
    tokenizer = server.service.asker.tokenizer
    pieces = Pieces(tokenizer, stop=stop)
    got = ""
    for update in updates(tokenizer, tokenizer.encode(text), at_once=at_once, finish=Finish.eos):
        for event in pieces.feed(update):
            assert isinstance(event, TextPiece)
            got += event.text
            assert shown.startswith(got)
    assert got == shown


def test_thoughts_are_told_apart(server) -> None:
    tokenizer = server.service.asker.tokenizer
    vocabulary = tokenizer.vocabulary
    ids = [vocabulary.bog, *tokenizer.encode("hm EN"), vocabulary.eog, *tokenizer.encode("D: yes")]
    pieces = Pieces(tokenizer, stop=("END",))
    events = [
        event
        for update in updates(tokenizer, ids, at_once=2, finish=Finish.eos)
        for event in pieces.feed(update)
    ]
    thought = "".join(e.text for e in events if isinstance(e, ThoughtPiece))
    text = "".join(e.text for e in events if isinstance(e, TextPiece))
    # A stop string does not reach from a thought into the answer.
    assert (thought, text) == ("hm EN", "D: yes")


def test_without_an_image_tokenizer_pictures_are_ids(
    start_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emu35.stages.serve.server._open_codec", lambda options, *, described: None)
    server = start_server()
    with pytest.raises(openai.BadRequestError, match="start it with --vision"):
        chat(server, "a fox", task="t2i", size="2x2")
    with pytest.raises(openai.BadRequestError, match="reads no pictures"):
        chat(server, [image_part(data_url(noise(4, 4)))])
    answer = chat(
        server, "a fox", task="t2i", size="2x2", return_images=False, return_token_ids=True
    )
    (codes_HW,) = deserialize(answer.choices[0].token_ids, server.service.asker.tokenizer).images
    assert codes_HW.shape == (2, 2)
    assert chat(server, max_tokens=4).choices[0].message.content is not None


def test_an_answer_goes_back_as_the_client_dumps_it(server) -> None:
    first = chat(server, "a fox", task="t2i", size="3x3", seed=3)
    turns = [
        {"role": "user", "content": "a fox"},
        first.choices[0].message.model_dump(warnings=False),
        {"role": "user", "content": "and a hen"},
    ]
    assert "tool_calls" in turns[1]
    plain = [turns[0], {"role": "assistant", "content": turns[1]["content"]}, turns[2]]
    sent = chat(server, messages=turns, max_tokens=8, seed=1)
    assert sent.usage.prompt_tokens > 9
    assert sent.usage == chat(server, messages=plain, max_tokens=8, seed=1).usage


NEUTRAL: dict[str, Any] = {
    "function_call": "none", "verbosity": None, "prompt_cache_key": "k", "moderation": None,
    "prompt_cache_retention": "24h", "stream": None, "n": None, "logprobs": None, "stop": None,
    "return_images": None, "image_sampling": None, "tools": None, "top_k": None,
}  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing(server) -> None:
    body = {"messages": [{"role": "user", "content": "once"}], "seed": 4, "max_tokens": 12}
    plain = server.post("/v1/chat/completions", body).json()
    for fields in (NEUTRAL, {"top_k": -1}, {"image_sampling": {"top_k": -1}}, {"model": "emu35"}):
        answer = server.post("/v1/chat/completions", {**body, **fields})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain["choices"]


def test_only_the_last_chunk_has_the_counts_and_the_others_say_so(server) -> None:
    def usages(path: str, body: dict[str, Any], **options: Any) -> list[Any]:
        answer = server.post(path, {**body, "max_tokens": 6, "stream": True, **options})
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")).get("usage", "none") for line in lines]

    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "once"}]}),
        ("/v1/completions", {"prompt": "once"}),
    ):
        *others, last = usages(path, body, stream_options={"include_usage": True})
        assert others
        assert set(others) == {None}
        assert last["completion_tokens"] > 0
        assert set(usages(path, body)) == {"none"}
