"""A distilled document is, byte for byte, what ingestion makes of the same task record with
pictures of the same codes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilling import call, write_prompts
from numpy.typing import NDArray
from PIL import Image as Pictures
from tiny_source import CODES

from emu35.config import LossWeights, TokenizerConfig
from emu35.data.batch import assemble
from emu35.data.ingest.ingest import ingest
from emu35.data.ingest.options import IngestOptions
from emu35.data.opening import open_source
from emu35.data.pack import Item
from emu35.data.plan import Sample
from emu35.inference.ask import prompt_seed
from emu35.inference.grammar import NextKind
from emu35.inference.request import Finish, Generated, Token
from emu35.stages.distill.judge import Drop, Judge
from emu35.stages.distill.prompts import Prompt, read_prompts
from emu35.stages.distill.run import distill
from emu35.stages.generate.run import generate
from emu35.tokens.document import Image, Part, Special, Text
from emu35.tokens.serialize import deserialize, join_parts
from emu35.tokens.text import build_text_tokenizer
from emu35.train.objective import response_weights
from emu35.vision.codec import load_codec, weights_digest
from emu35.vision.resize import open_image, to_pixels

TOKENIZER = TokenizerConfig(codebook_size=CODES)
TEXTS = build_text_tokenizer(TOKENIZER)
BOG, EOG = Special("<|extra_60|>"), Special("<|extra_61|>")
BOC, EOC = Special("<|extra_50|>"), Special("<|extra_51|>")
ESS, EOS = Special("<|extra_101|>"), Special("<|extra_204|>")


class Known:
    """An image tokenizer that knows the codes of every picture by its grey level."""

    factor = 2
    dtype = "float32"

    def __init__(self, *, digest: str) -> None:
        self.digest = digest
        self._codes: list[NDArray[np.integer]] = []

    def picture(self, codes_HW: NDArray[np.integer], *, path: Path) -> str:
        """Write a picture that will be encoded as ``codes_HW``; its name."""
        height, width = (2 * side for side in codes_HW.shape)
        level = len(self._codes)
        Pictures.new("RGB", (width, height), (level, level, level)).save(path)
        self._codes.append(codes_HW)
        return path.name

    def join(self, *, worker: int, workers: int) -> None:
        """There is nothing to share."""

    def check(self) -> None:
        """Nothing to load."""

    def prepare(self, data: bytes | Path) -> Pictures.Image:
        return open_image(data)

    def encode(self, pictures: Sequence[Pictures.Image]) -> list[NDArray[np.integer[Any]]]:
        return [self._codes[int(np.asarray(picture)[0, 0, 0])] for picture in pictures]


def ingested(folder: Path, records: Sequence[dict[str, Any]], *, encoder: Known) -> Path:
    """The shards of task records, from a file that is called as that of the prompts."""
    file = write_prompts(folder, records)
    options = IngestOptions(
        inputs=[file], out=folder / "ingested", source="self", tokenizer=TOKENIZER
    )
    ingest(options, encoder=encoder)
    return folder / "ingested"


def test_shards_are_those_of_ingestion(run: Path, tmp_path: Path) -> None:
    """Drawings and edits through the whole engine: every shard, whole."""
    vision = run.parent / "vision"
    encoder = Known(digest=weights_digest(vision))
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Pictures.fromarray(values).save(tmp_path / "shown.png")
    asked = [
        {"id": "a", "task": "t2i", "prompt": "a red circle"},
        {"id": "b", "task": "x2i", "prompt": "make it red", "images": ["shown.png"] * 2},
        {"id": "c", "task": "t2i", "prompt": "ein Kreis \u2028 <|extra_100|>"},
    ]
    prompts = write_prompts(tmp_path, asked)
    area = 6 * 8 * 4
    out = tmp_path / "out"
    options = call(run, prompts, out, prompts_per_shard=9, seed=5, image_area=area)
    assert distill(options).kept == 3

    # The same answers from generation, which is told their seeds.
    seeded = [record | {"seed": prompt_seed(5, index=n)} for n, record in enumerate(asked)]
    (tmp_path / "seeded.jsonl").write_text("".join(json.dumps(one) + "\n" for one in seeded))
    told = replace(
        options.ask, out=tmp_path / "generated", prompts_file=tmp_path / "seeded.jsonl", page=False
    )
    answers = [answer.document.images[0] for answer in generate(told).answers]
    pixels_3HW = to_pixels(open_image(tmp_path / "shown.png"), area=area, factor=2)
    (shown_HW,) = load_codec(vision).encode(torch.from_numpy(pixels_3HW)[None]).numpy()
    folder = tmp_path / "records"
    folder.mkdir()
    shown = encoder.picture(shown_HW, path=folder / "shown.png")
    records: list[dict[str, Any]] = []
    for number, (record, codes_HW) in enumerate(zip(asked, answers, strict=True)):
        made = {key: record[key] for key in ("task", "prompt")} | {"id": f"{record['id']}#0"}
        if "images" in record:
            made["references"] = [shown, shown]
        made["image"] = encoder.picture(codes_HW, path=folder / f"{number}.png")
        records.append(made)
    expected = ingested(folder, records, encoder=encoder)
    for kind in ("tar", "idx"):
        name = f"self-000000.{kind}"
        assert (out / name).read_bytes() == (expected / name).read_bytes()

    # And what training learns of them are the answers.
    source = open_source(name="self", path=out, vocabulary=TEXTS.vocabulary, limit=2048)
    sample = Sample(number=0, items=[Item(0, 0)])
    batch = assemble([sample], sources=[source], sequence_length=2048, pad=TEXTS.vocabulary.pad)
    weights = LossWeights(text=1.0, visual=1.0, layout=1.0, control=1.0)
    weights_S = response_weights(weights, vocabulary=TEXTS.vocabulary)(batch)[0]
    learned = batch.labels[0][weights_S > 0].tolist()
    assert learned == join_parts([Image(answers[0]), ESS, EOS], TEXTS)


A, B = Image(np.arange(12).reshape(3, 4)), Image(np.array([[5, 6], [7, 8]]))

ANSWERS: dict[str, tuple[dict[str, Any], list[Part], Finish]] = {
    "a story that ended itself": (
        {"task": "story", "steps": [{"text": "One. ", "image": "a.png"}, {"text": "End."}]},
        [Text("One. "), A, Text("End."), ESS, EOS],
        Finish.eos,
    ),
    "a story that ended with its last picture": (
        {
            "task": "story",
            "thought": "plan",
            "references": ["b.png"],
            "steps": [{"text": "One.", "thought": "red", "image": "a.png"}, {"image": "b.png"}],
        },
        [BOG, Text("plan"), EOG, Text("One."), BOC, Text("red"), EOC, A, B],
        Finish.images,
    ),
    "an end without EOS": (
        {"task": "story", "steps": [{"text": "<|extra_101|>", "image": "b.png"}]},
        [Text("<|extra_101|>"), B, ESS],
        Finish.eos,
    ),
    "a manipulation": (
        {"task": "vla", "references": ["a.png"], "steps": [{"text": "Up.", "image": "b.png"}]},
        [Text("Up."), B, EOS],
        Finish.eos,
    ),
    "a walk": (
        {
            "task": "explore",
            "kinds": ["text_free"],
            "steps": [{"text": "Gate.", "image": "a.png"}, {"text": "Yard.", "image": "b.png"}],
        },
        [Text("Gate."), A, Text("Yard."), B, ESS, EOS],
        Finish.stop,
    ),
    "a drawing with both thoughts": (
        {"task": "t2i", "thought": "g", "image_thought": "i", "image": "a.png"},
        [BOG, Text("g"), EOG, BOC, Text("i"), EOC, A],
        Finish.images,
    ),
}


def answered(parts: Sequence[Part], *, finish: Finish) -> Generated:
    ids = join_parts(parts, TEXTS)
    tokens = [Token(id=id, kind=NextKind.FORCED) for id in ids]
    return Generated(index=0, tokens=tokens, document=deserialize(ids, TEXTS), finish=finish)


def judge_of(tmp_path: Path, record: dict[str, Any]) -> tuple[Judge, Prompt]:
    prompts = write_prompts(tmp_path / "prompts", [record])
    options = call(tmp_path, prompts, tmp_path / "out")
    codec: Any = None  # no reward looks at pictures
    judge = Judge(options=options, tokenizer=TEXTS, codec=codec, reward=None)
    (prompt,) = read_prompts(options, reward=None)
    return judge, prompt


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_any_form_is_the_document_of_its_record(name: str, tmp_path: Path) -> None:
    fields, answer, finish = ANSWERS[name]
    folder = tmp_path / "records"
    folder.mkdir()
    encoder = Known(digest="known" * 8)
    grids = {
        encoder.picture(image.codes_HW, path=folder / path): image.codes_HW
        for path, image in (("a.png", A), ("b.png", B))
    }
    shards = ingested(folder, [{"prompt": "Please.", **fields}], encoder=encoder)
    source = open_source(name="self", path=shards, vocabulary=TEXTS.vocabulary, limit=4096)
    words, _ = source.source.words(0)

    judge, prompt = judge_of(tmp_path, {"prompt": "Please.", "task": fields["task"]})
    references = [grids[path] for path in fields.get("references", [])]
    (sample,) = judge.judge(
        prompt, answers=[answered(answer, finish=finish)], references=references
    )
    assert sample.drop is None
    assert sample.sequence is not None
    assert sample.sequence.tokens.tolist() == words.tolist()
    assert sample.sequence.modality.tolist() == source.source.codes(0).tolist()


@pytest.mark.parametrize(
    ("answer", "finish", "drop"),
    [
        ([Text("One."), A, Text("Two")], Finish.length, Drop.cut_off),
        ([Text("no picture"), ESS, EOS], Finish.eos, Drop.no_picture),
        ([BOG, Text("no end"), A], Finish.images, Drop.broken),
        ([A, Special("<|extra_7|>"), ESS, EOS], Finish.eos, Drop.broken),
        ([A, ESS, Text("beyond"), B, EOS], Finish.eos, Drop.broken),
        ([BOC, Text("thought of nothing"), EOC, ESS, EOS], Finish.eos, Drop.broken),
        ([Text("\N{REPLACEMENT CHARACTER}"), A, ESS, EOS], Finish.eos, Drop.bad_text),
    ],
)
def test_an_answer_that_is_not_whole_is_named(
    answer: list[Part], finish: Finish, drop: Drop, tmp_path: Path
) -> None:
    judge, prompt = judge_of(tmp_path, {"prompt": "Please.", "task": "story"})
    (sample,) = judge.judge(prompt, answers=[answered(answer, finish=finish)], references=[])
    assert (sample.drop, sample.sequence) == (drop, None)
    assert sample.row()["why"] == drop.value
