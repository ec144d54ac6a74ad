"""Task records: what is accepted, what a reject says, and documents against what inference asks."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu35.config.tokenizer import TokenizerConfig, TokenizerKind
from emu35.data.ingest.pictures import EncodedRecord
from emu35.data.readers.jsonl import read_jsonl
from emu35.data.readers.records import RawRecord, Reason, Reject
from emu35.data.readers.task_documents import Starts
from emu35.data.readers.task_table import TASK_FORMS, describe_task, describe_tasks
from emu35.tokens.answer import Answer, AnswerImage, AnswerText, read_answer
from emu35.tokens.document import Document, Image, Part
from emu35.tokens.serialize import deserialize, image_tokens, serialize
from emu35.tokens.template import Task, Turn, build_prompt
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

NAMES = ("a.jpg", "b.jpg", "c.jpg")
CODES = {name: np.full((at + 1, 2), at) for at, name in enumerate(NAMES)}
TEXTS = build_text_tokenizer(TokenizerConfig(codebook_size=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are there; readers do not open them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in NAMES:
        (folder / name).touch()
    return folder


def read(folder: Path, *lines: Any, starts: Starts = Starts.all) -> list[RawRecord | Reject]:
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path = folder / "t.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return list(read_jsonl(path, starts=starts))


def reject_of(folder: Path, record: Any) -> Reject:
    good = {"task": "chat", "prompt": "Hi", "answer": "Ho"}
    _, reject = read(folder, good, record)
    assert isinstance(reject, Reject)
    assert reject.id.startswith("t.jsonl:2")
    return reject


def documents(record: RawRecord | Reject) -> dict[str, list[Part]]:
    assert isinstance(record, RawRecord), record
    codes = {raw: Image(CODES[Path(raw.data).name]) for raw in record.pictures()}  # type: ignore[arg-type]
    encoded = EncodedRecord(record=record, codes=codes, hashes={})
    return {id.partition("#")[2]: parts for id, parts, _ in encoded.documents()}


@pytest.mark.parametrize("task", list(TASK_FORMS))
def test_the_printed_example_is_a_record(folder: Path, task: Task) -> None:
    *rows, example = describe_task(task)
    (record,) = read(folder, example.strip())
    assert isinstance(record, RawRecord), record
    for field in (*TASK_FORMS[task].asked, *TASK_FORMS[task].answered, *TASK_FORMS[task].step):
        name = field.name if field.required else f"[{field.name}]"
        assert any(row.split()[0] == name and field.meaning in row for row in rows)


def test_the_schema_is_the_docstring() -> None:
    from emu35.data.readers import task_table

    assert task_table.__doc__
    assert set(TASK_FORMS) == set(Task)
    assert all(line in task_table.__doc__ for line in describe_tasks())
    assert max(len(line) for task in Task for line in list(describe_task(task))[:-1]) < 160


T2I = {"task": "t2i", "prompt": "x", "image": "a.jpg"}
STORY = {"task": "story", "prompt": "x", "steps": [{"text": "one"}]}
VIEW = {"text": "v", "image": "a.jpg", "instruction": "go"}
EXPLORE = {"task": "explore", "prompt": "x", "steps": [VIEW, VIEW]}
VLA = {"task": "vla", "prompt": "x", "references": ["a.jpg"], "steps": [VIEW]}


@pytest.mark.parametrize(
    ("record", "value", "rule", "remedy"),
    [
        ({"task": "storry"}, "task is 'storry'", "one of chat, t2i", "Did you mean 'story'?"),
        ({"task": ["t2i"]}, "task is ['t2i']", "one of chat, t2i", "rename the key"),
        ({**T2I, "promt": "x"}, "'promt' is no field", "it has id, thought", "'prompt'? Rename it"),
        ({**T2I, "answer": "x"}, "'answer' is no field of the t2i task", "prompt, image", "leave"),
        ({"task": "t2i", "image": "a.jpg"}, "prompt is missing", "a text that is not", "give it"),
        ({**T2I, "prompt": None}, "prompt is null", "a text that is not blank", "give it"),
        ({**T2I, "prompt": 7}, "prompt is 7", "not a text", "write it as a string"),
        ({**T2I, "prompt": " \n"}, r"prompt is ' \n'", "is blank", "write it"),
        ({**T2I, "image": ["a.jpg"]}, "image is ['a.jpg']", "not the path", "write the path"),
        ({**T2I, "image": ""}, "image is ''", "not the path of a picture", "write the path"),
        ({**T2I, "id": 1.5}, "id is 1.5", "a text or a whole number", "make it one"),
        ({**T2I, "thought": ["x"]}, "thought is ['x']", "not a text", "write it as a string"),
        ({**STORY, "steps": {}}, "steps is {}", "not a list of steps", "make it one"),
        ({**STORY, "steps": []}, "steps has 0 entries", "has 1 or more", "add or remove"),
        ({**STORY, "steps": ["x"]}, "steps[0] is 'x'", "not an object", "write it in {}"),
        ({**STORY, "steps": [{}]}, "steps[0] has neither", "text nor image", "give it one"),
        (
            {**STORY, "steps": [{"text": "a"}, {"text": "b", "thought": "why"}]},
            "steps[1].thought is 'why' without an image",
            "chain of thought of the step's picture",
            "give the image, or make",
        ),
        ({**STORY, "images": ["a.jpg"]}, "'images' is no field", "references", "Rename it"),
        ({**STORY, "task": "howto"}, "steps has 1 entries", "has 2 to 10", "add or remove"),
        (
            {**STORY, "task": "howto", "steps": [{"text": "x"}] * 11},
            "steps has 11 entries",
            "the howto task has 2 to 10",
            "add or remove",
        ),
        ({**EXPLORE, "steps": [VIEW]}, "steps has 1 entries", "has 2 or more", "add or remove"),
        (
            {**EXPLORE, "steps": [VIEW, {"text": "x", "instruction": "go"}]},
            "steps[1].image is missing",
            "the path of a picture (the view)",
            "give it",
        ),
        ({**EXPLORE, "kinds": []}, "kinds has 0 entries", "has 1 or more", "add or remove"),
        ({**EXPLORE, "kinds": ["free"]}, "kinds has 'free', which is unknown", "each once", "mend"),
        ({**EXPLORE, "kinds": [["x"]]}, "which is unknown", "text_interactive, ", "mend"),
        (
            {**EXPLORE, "kinds": ["text_free", "text_free"]},
            "kinds has 'text_free', which is given twice",
            "each once",
            "mend it",
        ),
        (
            {**EXPLORE, "turns": []},
            "'turns' is no field of the explore",
            "kinds, prompt, steps",
            "leave",
        ),
        ({**EXPLORE, "references": []}, "'references' is no field", "prompt, steps", "leave"),
        ({**VLA, "references": []}, "references has 0 entries", "has 1 or more", "add or"),
        ({"task": "vla", "prompt": "x", "steps": []}, "references is missing", "paths", "give it"),
        ({**VLA, "steps": [VIEW]}, "steps[0].'instruction' is no field", "text, thought", "leave"),
        ({**VLA, "steps": [{"image": "a.jpg"}]}, "steps[0].text is missing", "subtask", "give it"),
        ({"task": "x2i", "prompt": "x", "image": "a.jpg"}, "references is missing", "", "give it"),
        ({"task": "t2i", "turns": []}, "turns has 0 entries", "has 1 or more", "add or remove"),
        ({**T2I, "turns": [T2I]}, "prompt stands beside turns", "belongs into a turn", "move it"),
        (
            {"task": "t2i", "turns": [T2I]},
            "turns[0].'task' is no field",
            "thought, prompt",
            "leave",
        ),
        ({"task": "t2i", "turns": [7]}, "turns[0] is 7", "not an object", "write it"),
        (
            {
                "task": "chat",
                "thought": "a",
                "turns": [{"prompt": "x", "answer": "y", "thought": "b"}],
            },
            "thought stands both",
            "one place",
            "leave one out",
        ),
        (
            {"task": "story", "turns": [{"prompt": "x", "steps": [{"text": ""}]}]},
            "turns[0].steps[0].text is ''",
            "blank",
            "write it",
        ),
    ],
)
def test_a_reject_names_value_rule_and_remedy(
    folder: Path, record: Any, value: str, rule: str, remedy: str
) -> None:
    reject = reject_of(folder, record)
    assert reject.reason == "not a task record as its schema says"
    for words in (value, rule, remedy):
        assert words in reject.detail
    if isinstance(record["task"], str) and record["task"] in list(Task):
        assert f"`emu35 data tasks {record['task']}`" in reject.detail


@pytest.mark.parametrize("image", ["no.jpg", ".", "a\0b", "x" * 3000, "\ud800", "http://x/a.jpg"])
def test_a_picture_that_is_not_there_is_named(folder: Path, image: str) -> None:
    record = {"task": "x2i", "prompt": "x", "references": ["a.jpg", image], "image": "a.jpg"}
    reject = reject_of(folder, {"id": "mine", **record})
    assert reject.id == "t.jsonl:2 mine"
    assert reject.reason == "missing or unreadable file"
    assert reject.detail.startswith("references[1] is ")
    assert "there is no such file; relative paths start at the folder of" in reject.detail
    assert str(folder) in reject.detail
    assert len(reject.detail) < 600


@pytest.mark.parametrize(
    "record",
    [
        {**T2I, "turns": None, "thought": None, "id": None, "image_thought": None},
        {**STORY, "references": None, "steps": [{"text": "x", "image": None, "thought": None}]},
        {**EXPLORE, "kinds": None},
        {"task": "chat", "turns": [{"prompt": "x", "answer": "y"}], "prompt": None, "other": None},
        {"task": None, "text": "no task"},
    ],
)
def test_null_is_as_good_as_absent(folder: Path, record: Any) -> None:
    bare = {key: value for key, value in record.items() if value is not None}
    found, expected = read(folder, record, bare)
    assert documents(found) == documents(expected)


def test_the_first_turn_of_an_edit_has_references_and_later_ones_may(folder: Path) -> None:
    edit = {"prompt": "x", "image": "a.jpg"}
    reject = reject_of(folder, {"task": "x2i", "turns": [edit, edit]})
    assert "turns[0].references is missing" in reject.detail
    (found,) = read(folder, {"task": "x2i", "turns": [{**edit, "references": []}, edit]})
    assert isinstance(found, RawRecord)


def test_a_start_is_drawn_by_the_id_of_the_record(folder: Path) -> None:
    """The same record on another line, or in another file, begins at the same step."""
    step = {"text": "x", "image": "a.jpg"}
    records = [{**VLA, "id": number, "steps": [step] * 9} for number in range(20)]
    first = [list(documents(found)) for found in read(folder, *records, starts=Starts.random)]
    moved = [
        list(documents(found))
        for found in read(folder, STORY, *records[::-1], starts=Starts.random)[1:]
    ]
    assert moved == first[::-1]
    assert len({starts[1] for starts in first}) > 3


def test_an_interactive_exploration_is_not_told_what_is_yet_to_be_asked(folder: Path) -> None:
    (found,) = read(folder, {**EXPLORE, "thought": "First the gate, then the yard."})
    told = {kind: "then the yard" in repr(parts) for kind, parts in documents(found).items()}
    assert told == {
        "text_interactive": False,
        "image_interactive": False,
        "text_free": True,
        "image_free": True,
    }


@pytest.mark.parametrize(
    "line",
    [
        '{"task": "t2i", "prompt": "x", "prompt": "y", "image": "a.jpg"}',
        '{"task": "t2i", "task": "t2i", "prompt": "x", "image": "a.jpg"}',
        '{"task": "t2i", "prompt": "x", "image": "a.jpg", "thought": "x", "thought": null}',
        '{"task": "story", "prompt": "x", "steps": [{"text": "a", "text": "b"}]}',
    ],
)
def test_a_key_that_stands_twice_is_refused(folder: Path, line: str) -> None:
    """JSON readers keep the last of the two and say nothing."""
    reject = reject_of(folder, line)
    assert reject.reason is Reason.bad_task
    assert re.match("'(prompt|task|thought|text)' stands twice in one object", reject.detail)
    (text,) = read(folder, '{"text": "x", "meta": {"a": 1, "a": 2}}')
    assert isinstance(text, RawRecord), "other keys of other lines are left unread"


def test_messages_stay_short_whatever_they_show(folder: Path) -> None:
    deep: Any = "x" * 10**5
    for _ in range(100):
        deep = [deep, deep]
        if len(json.dumps(deep)) > 10**7:
            break
    for record in ({**T2I, "prompt": deep}, {**T2I, "x" * 10**5: 1}, {"task": deep}):
        assert len(reject_of(folder, record).detail) < 1000


# Documents against inference


@pytest.fixture(scope="module")
def released(table: Path) -> TextTokenizer:
    return build_text_tokenizer(
        TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131072, table=str(table))
    )


@pytest.mark.golden
@pytest.mark.parametrize(
    ("task", "references"),
    [
        (Task.t2i, []),
        *((task, names) for task in (Task.x2i, Task.howto) for names in ([], ["b.jpg", "a.jpg"])),
    ],
)
def test_documents_of_the_released_tokenizer_begin_as_the_official_template(
    folder: Path, released: TextTokenizer, golden_folder: Path, task: Task, references: list[str]
) -> None:
    golden = json.loads((golden_folder / "pipeline.json").read_text())["prompts"]
    template = golden[f"{task.value}|image={bool(references)}"]["template"]
    record = copy.deepcopy({"task": task.value, **TASK_FORMS[task].example})
    record |= {"prompt": "a red cat", **({} if task is Task.t2i else {"references": references})}
    (parts,) = documents(read(folder, record)[0]).values()
    ids = serialize(Document(parts), released).tokens.tolist()
    pictures = "".join(released.decode(image_tokens(CODES[name], released)) for name in references)
    official = template.format(question="a red cat").replace("<|IMAGE|>", pictures)
    expected = released.encode(official, allow_special=True)
    assert ids[: len(expected)] == expected
    assert released.decode(ids).startswith(official)
    if not references:
        assert expected == golden[f"{task.value}|image=False"]["ids_prompt"]


WORDS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["<|extra_101|>", " USER: ", "<|image start|>", "e\u0301", "\u0301x", "\ud800", "4*4", "\n"]
    ),
).filter(lambda text: bool(text.strip()))
PICTURE = st.sampled_from(NAMES)
PICTURES = st.lists(PICTURE, max_size=2)


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Any:
    return st.fixed_dictionaries(required, optional=optional or {})


STEP = st.one_of(
    fields({"text": WORDS}),
    fields({"image": PICTURE}, {"text": WORDS, "thought": WORDS}),
)
ANSWERS: dict[Task, dict[str, Any]] = {
    Task.chat: {"answer": WORDS},
    Task.t2i: {"image": PICTURE},
    Task.x2i: {"image": PICTURE, "references": PICTURES},
    Task.story: {"steps": st.lists(STEP, min_size=1, max_size=3)},
    Task.howto: {"steps": st.lists(STEP, min_size=2, max_size=4)},
    Task.explore: {
        "steps": st.lists(
            fields({"image": PICTURE, "instruction": WORDS}, {"text": WORDS, "thought": WORDS}),
            min_size=2,
            max_size=4,
        )
    },
    Task.vla: {
        "references": st.lists(PICTURE, min_size=1, max_size=2),
        "steps": st.lists(
            fields({"image": PICTURE, "text": WORDS}, {"thought": WORDS}), min_size=1, max_size=4
        ),
    },
}
MAYBE: dict[Task, dict[str, Any]] = {
    Task.chat: {"images": PICTURES},
    Task.t2i: {"image_thought": WORDS},
    Task.x2i: {"image_thought": WORDS},
    Task.story: {"references": PICTURES},
    Task.howto: {"references": PICTURES},
}


@st.composite
def task_records(draw: st.DrawFn) -> dict[str, Any]:
    """Any sound record."""
    task = draw(st.sampled_from(list(Task)))
    turn = fields({"prompt": WORDS, **ANSWERS[task]}, {"thought": WORDS, **MAYBE.get(task, {})})
    if TASK_FORMS[task].several_turns and draw(st.booleans()):
        return {"task": task.value, "turns": draw(st.lists(turn, min_size=1, max_size=3))}
    return {"task": task.value, **draw(turn)}


def answers_of(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where each answer lies: after its BSS, up to its ESS."""
    v = TEXTS.vocabulary
    begins = [at + 1 for at, id in enumerate(ids) if id == v.bss]
    ends = [at for at, id in enumerate(ids) if id == v.ess]
    return list(zip(begins, ends, strict=True))


def normal(text: str) -> str:
    """As text comes back from the tokenizer."""
    return TEXTS.decode(TEXTS.encode(text))


def expected_answer(turn: dict[str, Any], steps: list[dict[str, Any]]) -> Answer:
    parts: list[AnswerText | AnswerImage] = []
    pending: list[str] = []
    for step in steps:
        pending += [step["text"]] if "text" in step else []
        if "image" in step:
            parts += [AnswerText(normal("\n\n".join(pending)))] if pending else []
            thought = normal(step["thought"]) if "thought" in step else None
            parts.append(AnswerImage(CODES[step["image"]], thought=thought))
            pending = []
    parts += [AnswerText(normal("\n\n".join(pending)))] if pending else []
    thought = normal(turn["thought"]) if "thought" in turn else None
    return Answer(thought=thought, parts=parts)


def plain_steps(turn: dict[str, Any]) -> list[dict[str, Any]]:
    if "answer" in turn:
        return [{"text": turn["answer"]}]
    if "steps" in turn:
        return turn["steps"]
    thought = {"thought": turn["image_thought"]} if "image_thought" in turn else {}
    return [{"image": turn["image"], **thought}]


Asked = tuple[str, list[str], dict[str, Any], list[dict[str, Any]]]
"""Prompt, pictures, the fields of the turn and the steps that answer it."""


def asked_in(record: dict[str, Any], *, document: str) -> list[Asked]:
    """The turns that a document must have, from the record as it was written."""
    steps = record.get("steps", [])
    bare = {key: value for key, value in record.items() if key != "thought"}
    if document.startswith("from_step_"):
        first = int(document.removeprefix("from_step_")) - 1
        return [(record["prompt"], [steps[first - 1]["image"]], bare, steps[first:])]
    if record["task"] == "explore":
        seen = [steps[0]["image"]] if document.startswith("image") else []
        told = steps[1:] if seen else steps
        if document.endswith("free"):
            return [(record["prompt"], seen, record, told)]
        prompt = f"{record['prompt']}\n{told[0]['instruction']}" if seen else record["prompt"]
        later = [(step["instruction"], [], bare, [step]) for step in told[1:]]
        return [(prompt, seen, bare, told[:1]), *later]
    return [
        (
            turn["prompt"],
            turn.get("references") or turn.get("images") or [],
            turn,
            plain_steps(turn),
        )
        for turn in record.get("turns", [record])
    ]


@settings(max_examples=80, deadline=None)
@given(record=task_records())
def test_documents_ask_as_inference_does_and_answer_as_the_record_says(
    folder: Path, record: dict[str, Any]
) -> None:
    found = documents(read(folder, record)[0])
    kinds = {
        "explore": ["text_interactive", "image_interactive", "text_free", "image_free"],
        "vla": ["", *(f"from_step_{at}" for at in range(2, len(record.get("steps", [])) + 1))],
    }
    assert list(found) == kinds.get(record["task"], [""])
    for document, parts in found.items():
        ids = serialize(Document(parts), TEXTS).tokens.tolist()
        spans = answers_of(ids)
        expected = asked_in(record, document=document)
        assert len(spans) == len(expected)
        earlier: list[Turn] = []
        for (begin, end), (prompt, names, turn, steps) in zip(spans, expected, strict=True):
            images = tuple(CODES[name] for name in names)
            asked = build_prompt(
                Task(record["task"]), prompt, images=images, earlier=earlier, tokenizer=TEXTS
            )
            assert ids[:begin] == asked.conditional
            answer = read_answer(deserialize(ids[begin : end + 1], TEXTS))
            assert answer == expected_answer(turn, steps)
            earlier.append(Turn(question=prompt, answer=tuple(ids[begin:end]), images=images))
        assert ids[spans[-1][1] :] == [TEXTS.vocabulary.ess, TEXTS.vocabulary.eos]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | PICTURE,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(["prompt", "steps", "turns", "image", "text", "thought", "kinds", "task"])


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    """A sound record with a value changed, added or removed anywhere in it."""
    record = draw(task_records())
    place: Any = record
    while True:
        if isinstance(place, list):
            keys: list[Any] = list(range(len(place)))
        else:
            keys = [*place, draw(KEYS)]
        if not keys:
            return record
        key = draw(st.sampled_from(keys))
        known = isinstance(place, list) or key in place
        if known and isinstance(place[key], dict | list) and draw(st.booleans()):
            place = place[key]
            continue
        if known and draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(JSON)
        return record


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(spoilt() | fields({"task": JSON | st.sampled_from(list(Task))}), max_size=4)
)
def test_every_line_becomes_documents_or_a_reject_with_its_number(
    folder: Path, records: list[Any]
) -> None:
    found = read(folder, *records)
    assert len(found) == len(records)
    for number, outcome in enumerate(found, start=1):
        assert outcome.id.split(" ")[0] == f"t.jsonl:{number}"
        if isinstance(outcome, RawRecord):
            for parts in documents(outcome).values():
                ids = serialize(Document(parts), TEXTS).tokens.tolist()
                assert bool(answers_of(ids)) == (records[number - 1].get("task") is not None)
        elif records[number - 1].get("task") is not None:
            assert outcome.reason in (Reason.bad_task, Reason.missing_file)
            assert re.search(r"; |Rename|Mend", outcome.detail)
