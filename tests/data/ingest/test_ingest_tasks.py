"""Task records through ingestion, packing and the loss: exactly the responses are learned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ingest_inputs import TOKENIZER, GreyLevels, documents_of, options_of, png, rejects_of

from emu35.config import LossWeights
from emu35.data.batch import Batch, SourceItems, assemble
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import Existing, PairOrder
from emu35.data.opening import open_source
from emu35.data.pack import Item
from emu35.data.plan import Sample
from emu35.data.readers.task_documents import Starts
from emu35.errors import DataError
from emu35.tokens.text import build_text_tokenizer
from emu35.train.objective import response_weights

TEXTS = build_text_tokenizer(TOKENIZER)
ROW = 16_384
BOS, EOS = "<|extra_203|>", "<|extra_204|>"
BSS, ESS = "<|extra_100|>", "<|extra_101|>"
BOG, EOG = "<|extra_60|>", "<|extra_61|>"
BOC, EOC = "<|extra_50|>", "<|extra_51|>"
PICTURES = {"a": (1, 2, 11), "b": (2, 1, 22), "c": (1, 1, 33), "d": (2, 2, 44)}
"""Name of a picture -> rows, columns and its one code."""


def shown(name: str) -> str:
    """A picture as a document spells it."""
    rows, columns, code = PICTURES[name]
    row = f"<|visual token {code:06d}|>" * columns
    body = "<|extra_200|>".join([row] * rows)
    return f"<|image start|>{rows}*{columns}<|image token|>{body}<|image end|>"


A, B, C, D = (shown(name) for name in "abcd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (rows, columns, code) in PICTURES.items():
        data = png(width=8 * columns, height=8 * rows, grey=4 * code)
        (tmp_path / f"{name}.png").write_bytes(data)
    return tmp_path


def write(folder: Path, *records: Any) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(folder: Path, *records: Any, **options: Any) -> Path:
    ingest(options_of([write(folder, *records)], folder / "out", **options), encoder=GreyLevels())
    return folder / "out"


def packed(out: Path) -> tuple[Batch, SourceItems]:
    """All documents of a source in one row."""
    entry = open_source(name="demo", path=out, vocabulary=TEXTS.vocabulary, limit=ROW)
    sample = Sample(number=0, items=[Item(0, item) for item in range(len(entry.items))])
    rows = assemble([sample], sources=[entry], sequence_length=ROW, pad=TEXTS.vocabulary.pad)
    return rows, entry


def learned(out: Path) -> dict[str, tuple[str, str]]:
    """Id of each document, packed into one row -> its text, and that of its labels of weight > 0,
    turn after turn."""
    batch, entry = packed(out)
    weights = LossWeights(text=1.0, visual=0.5, layout=1.0, control=1.0)
    weights_S = response_weights(weights, vocabulary=TEXTS.vocabulary)(batch)[0]
    found: dict[str, tuple[str, str]] = {}
    for number in range(len(entry.items)):
        length = int(entry.items.length[number])
        start = int(entry.items.length[:number].sum())
        own = slice(start, start + length)
        labels = batch.labels[0, own][weights_S[own] > 0]
        id = json.loads(entry.source.facts(number))["id"].removeprefix("tasks.jsonl:")
        found[id] = (TEXTS.decode(batch.tokens[0, own].tolist()), TEXTS.decode(labels.tolist()))
    assert not weights_S[int(entry.items.length.sum()) :].any()
    return found


def opening(task: str, *, extra: str = "") -> str:
    words = "" if task == "chat" else f" for {task} task"
    return f"{BOS}You are a helpful assistant{words}.{extra} USER: "


SINGLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "language": (
        {"task": "chat", "prompt": "Why?", "answer": "Because."},
        opening("chat") + "Why?",
        "Because.",
    ),
    "vqa": (
        {"task": "chat", "prompt": "What?", "images": ["a.png", "b.png"], "answer": "A cup."},
        f"{opening('chat')}What?{A}{B}",
        "A cup.",
    ),
    "t2i": (
        {"task": "t2i", "prompt": "a cup", "image": "a.png"},
        opening("t2i") + "a cup",
        A,
    ),
    "t2i with both thoughts": (
        {"task": "t2i", "prompt": "a cup", "image": "a.png", "thought": "g", "image_thought": "i"},
        opening("t2i") + "a cup",
        f"{BOG}g{EOG}{BOC}i{EOC}{A}",
    ),
    "x2i": (
        {"task": "x2i", "prompt": "both", "references": ["a.png", "c.png"], "image": "b.png"},
        f"{opening('x2i')}{A}{C}both",
        B,
    ),
    "x2i without references": (
        {"task": "x2i", "prompt": "none", "references": [], "image": "b.png"},
        opening("x2i") + "none",
        B,
    ),
    "story": (
        {
            "task": "story",
            "prompt": "Tell.",
            "references": ["d.png"],
            "thought": "plan",
            "steps": [
                {"text": "One.", "thought": "red", "image": "a.png"},
                {"image": "b.png"},
                {"text": "Two."},
                {"text": "End."},
            ],
        },
        f"{opening('story')}Tell.{D}",
        f"{BOG}plan{EOG}One.{BOC}red{EOC}{A}{B}Two.\n\nEnd.",
    ),
    "howto": (
        {
            "task": "howto",
            "prompt": "How?",
            "steps": [{"text": "One."}, {"text": "Two.", "image": "c.png"}],
        },
        opening("howto", extra=" Please generate a response with interleaved text and images.")
        + "How?",
        f"One.\n\nTwo.{C}",
    ),
    "vla": (
        {
            "task": "vla",
            "prompt": "Clear up.",
            "references": ["a.png", "b.png"],
            "steps": [{"text": "Grasp.", "image": "c.png"}],
        },
        f"{opening('vla')}Clear up.{A}{B}",
        f"Grasp.{C}",
    ),
    "specials in every text": (
        {
            "task": "story",
            "prompt": f"p{BSS}{EOS}",
            "thought": f"g{EOG}",
            "steps": [{"text": f"t{ESS}<|image start|>", "thought": f"i{BSS}", "image": "a.png"}],
        },
        f"{opening('story')}p{BSS}{EOS}",
        f"{BOG}g{EOG}{EOG}t{ESS}<|image start|>{BOC}i{BSS}{EOC}{A}",
    ),
}


def test_exactly_the_response_of_every_task_is_learned(folder: Path) -> None:
    """One row holds a document of each task, with a plain document and a pair between them."""
    plain = [{"text": "no task"}, {"image": "a.png", "caption": "no task either"}]
    records = [record for record, _, _ in SINGLE.values()]
    found = learned(run(folder, records[0], *plain, *records[1:]))
    assert found["2"][1] == found["3"][1] == "", "a document without a response teaches nothing"
    del found["2"], found["3"]
    for (name, (_, asked, answer)), (text, labels) in zip(
        SINGLE.items(), found.values(), strict=True
    ):
        assert text == f"{asked} ASSISTANT: {BSS}{answer}{ESS}{EOS}", name
        assert labels == f"{answer}{ESS}{EOS}", name


def test_questions_of_later_turns_are_not_learned(folder: Path) -> None:
    step = {"text": "One.", "thought": "i", "image": "b.png"}
    turns = [
        {"prompt": "Tell.", "references": ["a.png"], "steps": [step]},
        {"prompt": "On.", "references": ["c.png"], "thought": "later", "steps": [{"text": "Two."}]},
        {"prompt": "More.", "steps": [{"image": "d.png"}]},
    ]
    chat = [{"prompt": "Hi", "answer": "Ho"}, {"prompt": "?", "images": ["a.png"], "answer": "!"}]
    edits = [
        {"prompt": "blue", "references": ["a.png"], "image": "b.png"},
        {"prompt": "red", "image": "c.png", "image_thought": "paint"},
    ]
    out = run(
        folder,
        {"task": "story", "thought": "plan", "turns": turns},
        {"task": "chat", "turns": chat},
        {"task": "x2i", "turns": edits},
    )
    answers = [f"{BOG}plan{EOG}One.{BOC}i{EOC}{B}", f"{BOG}later{EOG}Two.", D]
    assert learned(out) == {
        "1": (
            f"{opening('story')}Tell.{A} ASSISTANT: {BSS}{answers[0]}{ESS}"
            f" USER: On.{C} ASSISTANT: {BSS}{answers[1]}{ESS}"
            f" USER: More. ASSISTANT: {BSS}{answers[2]}{ESS}{EOS}",
            f"{ESS}".join(answers) + ESS + EOS,
        ),
        "2": (
            f"{opening('chat')}Hi ASSISTANT: {BSS}Ho{ESS} USER: ?{A} ASSISTANT: {BSS}!{ESS}{EOS}",
            f"Ho{ESS}!{ESS}{EOS}",
        ),
        "3": (
            f"{opening('x2i')}{A}blue ASSISTANT: {BSS}{B}{ESS}"
            f" USER: red ASSISTANT: {BSS}{BOC}paint{EOC}{C}{ESS}{EOS}",
            f"{B}{ESS}{BOC}paint{EOC}{C}{ESS}{EOS}",
        ),
    }


WALK: dict[str, Any] = {
    "task": "explore",
    "prompt": "Walk.",
    "thought": "plan",
    "steps": [
        {"text": "Gate.", "image": "a.png"},
        {"instruction": "In.", "text": "Yard.", "thought": "wide", "image": "b.png"},
        {"instruction": "Left.", "image": "c.png"},
    ],
}


def test_an_exploration_becomes_four_documents(folder: Path) -> None:
    begin, asked, yard = opening("explore"), f" ASSISTANT: {BSS}", f"Yard.{BOC}wide{EOC}{B}"
    plan = f"{BOG}plan{EOG}"
    assert learned(run(folder, WALK)) == {
        "1#text_interactive": (
            f"{begin}Walk.{asked}Gate.{A}{ESS} USER: In.{asked}{yard}{ESS}"
            f" USER: Left.{asked}{C}{ESS}{EOS}",
            f"Gate.{A}{ESS}{yard}{ESS}{C}{ESS}{EOS}",
        ),
        "1#image_interactive": (
            f"{begin}Walk.\nIn.{A}{asked}{yard}{ESS} USER: Left.{asked}{C}{ESS}{EOS}",
            f"{yard}{ESS}{C}{ESS}{EOS}",
        ),
        "1#text_free": (
            f"{begin}Walk.{asked}{plan}Gate.{A}{yard}{C}{ESS}{EOS}",
            f"{plan}Gate.{A}{yard}{C}{ESS}{EOS}",
        ),
        "1#image_free": (
            f"{begin}Walk.{A}{asked}{plan}{yard}{C}{ESS}{EOS}",
            f"{plan}{yard}{C}{ESS}{EOS}",
        ),
    }


def test_kinds_choose_and_free_kinds_need_no_instructions(folder: Path) -> None:
    steps = [{"text": "Gate.", "image": "a.png"}, {"text": "Yard.", "image": "b.png"}]
    record = {"task": "explore", "prompt": "Walk.", "steps": steps}
    out = run(
        folder, {**record, "id": "x", "kinds": ["image_free"]}, {**record, "kinds": ["text_free"]}
    )
    assert list(learned(out)) == ["1 x#image_free", "2#text_free"]
    with pytest.raises(DataError):
        run(folder, record, existing=Existing.replace)
    (reject,) = rejects_of(folder / "out")
    assert reject["id"] == "tasks.jsonl:1"
    assert "steps[1].instruction is missing" in reject["detail"]
    assert "leave interactive kinds out" in reject["detail"]


PICK: dict[str, Any] = {
    "task": "vla",
    "prompt": "Clear up.",
    "references": ["a.png"],
    "thought": "plan",
    "steps": [
        {"text": "Grasp.", "image": "b.png"},
        {"text": "Lift.", "thought": "high", "image": "c.png"},
        {"text": "Drop.", "image": "d.png"},
    ],
}


def test_a_manipulation_also_begins_at_later_steps(folder: Path) -> None:
    begin, asked, lift = opening("vla"), f" ASSISTANT: {BSS}", f"Lift.{BOC}high{EOC}{C}"
    expected = {
        "1": (
            f"{begin}Clear up.{A}{asked}{BOG}plan{EOG}Grasp.{B}{lift}Drop.{D}{ESS}{EOS}",
            f"{BOG}plan{EOG}Grasp.{B}{lift}Drop.{D}{ESS}{EOS}",
        ),
        "1#from_step_2": (
            f"{begin}Clear up.{B}{asked}{lift}Drop.{D}{ESS}{EOS}",
            f"{lift}Drop.{D}{ESS}{EOS}",
        ),
        "1#from_step_3": (
            f"{begin}Clear up.{C}{asked}Drop.{D}{ESS}{EOS}",
            f"Drop.{D}{ESS}{EOS}",
        ),
    }
    replace = {"existing": Existing.replace}
    assert learned(run(folder, PICK, starts=Starts.all)) == expected
    assert list(learned(run(folder, PICK, starts=Starts.first, **replace))) == ["1"]
    out = run(folder, *[PICK] * 30, {**PICK, "steps": PICK["steps"][:1]}, **replace)
    found = list(learned(out))
    drawn = [id.partition("#")[2] for id in found if "#" in id]
    assert found[-1] == "31", "there is no later step in a record of one"
    assert len(drawn) == 30
    assert 6 <= drawn.count("from_step_2") <= 24
    assert set(drawn) == {"from_step_2", "from_step_3"}
    again = run(folder, *[PICK] * 30, {**PICK, "steps": PICK["steps"][:1]}, **replace)
    assert list(learned(again)) == found


def test_pictures_that_documents_share_are_encoded_once(folder: Path) -> None:
    encoder = GreyLevels()
    path = write(folder, WALK, PICK)
    summary = ingest(options_of([path], folder / "out", starts=Starts.all), encoder=encoder)
    assert summary.documents == 7
    assert sum(encoder.calls) == 7, "three pictures of the walk, four of the manipulation"


def test_the_order_of_pairs_does_not_touch_tasks(folder: Path) -> None:
    out = run(folder, SINGLE["t2i"][0], SINGLE["vqa"][0], order=PairOrder.image_first)
    (t2i, _), (vqa, _) = learned(out).values()
    assert t2i == f"{opening('t2i')}a cup ASSISTANT: {BSS}{A}{ESS}{EOS}"
    assert vqa == f"{opening('chat')}What?{A}{B} ASSISTANT: {BSS}A cup.{ESS}{EOS}"


def test_a_document_that_is_too_long_is_named_and_the_others_of_its_record_stay(
    folder: Path,
) -> None:
    whole = learned(run(folder, PICK, starts=Starts.all))["1"][0]
    limit = len(TEXTS.encode(whole, allow_special=True)) - 1
    out = run(
        folder,
        PICK,
        {"text": "x" * 999},
        sequence_length=limit,
        starts=Starts.all,
        existing=Existing.replace,
    )
    assert [name for name, _ in documents_of(out)] == [
        "tasks.jsonl:1#from_step_2",
        "tasks.jsonl:1#from_step_3",
        "tasks.jsonl:2",
    ]
    (reject,) = rejects_of(out)
    assert reject["id"] == "tasks.jsonl:1"
    assert reject["reason"] == "task document longer than the sequence length"
    assert reject["detail"].startswith(f"{limit + 1} tokens, above {limit}, ")
    assert "lower the area" in reject["detail"]


def test_another_choice_of_starts_is_another_ingestion(folder: Path) -> None:
    out = run(folder, PICK, starts=Starts.first)
    with pytest.raises(DataError, match="starts was first and is all"):
        run(folder, PICK, starts=Starts.all)
    books = out / ".ingest" / "manifest.json"
    body = json.loads(books.read_text())
    # Books from before the option: they go on with its default, and with nothing else.
    del body["identity"]["starts"]
    books.write_text(json.dumps(body))
    with pytest.raises(DataError, match="starts was random and is first"):
        run(folder, PICK, starts=Starts.first)
    assert run(folder, PICK) == out


def test_a_response_cut_open_ends_with_its_document() -> None:
    """Weights follow the marks, whatever stands between them."""
    v = TEXTS.vocabulary
    rows = [
        [v.bos, 70, v.bss, 71, v.eos, v.bos, 72, 73, v.ess, v.eos],
        [v.bos, v.bss, 71, v.bss, 72, v.ess, v.ess, 73, v.eos, v.pad],
    ]
    starts = [[0] * 5 + [5] * 5, [0] * 9 + [10]]
    tokens_BS, start_BS = torch.tensor(rows), torch.tensor(starts)
    labels_BS = tokens_BS.roll(-1, 1)
    valid_BS = start_BS == start_BS.roll(-1, 1)
    valid_BS[:, -1] = False
    batch = Batch(
        tokens=tokens_BS,
        labels=labels_BS,
        label_modality=torch.zeros_like(tokens_BS, dtype=torch.uint8),
        label_valid=valid_BS,
        positions=torch.zeros_like(tokens_BS),
        document_start=start_BS,
        label_source=torch.zeros_like(tokens_BS, dtype=torch.int16),
        sample_ids=[0, 1],
    )
    weights = response_weights(LossWeights(text=1.0), vocabulary=v)(batch)
    learned = [row[mask > 0].tolist() for row, mask in zip(labels_BS, weights, strict=True)]
    assert learned[0] == [71, v.eos], "no label of the second document, which has no BSS"
    assert learned[1] == [71, 72, v.ess, v.eos], "neither a second BSS nor what follows ESS"
