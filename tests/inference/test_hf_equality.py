"""Greedy tokens of the engine equal those of Hugging Face's ``generate``, written the plain way."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Request
from emu35.inference.sampler import EVERYTHING
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.tokens.template import Task, build_prompt
from emu35.tokens.text import ByteTokenizer
from emu35.tokens.vocabulary import Vocabulary

TOKENIZER = ByteTokenizer(vocabulary=Vocabulary(n_text=256, codebook_size=512))
V = TOKENIZER.vocabulary
COLD = replace(EVERYTHING, temperature=0.0)
CAPTIONS = (
    "a red circle",
    "two",
    "a blue square to the left of a small green triangle, on white",
    "mountains at dawn, oil painting",
)
GRIDS = ((3, 16), (5, 4), (2, 16), (4, 7))


@pytest.fixture(scope="module")
def hf(repository: Path) -> Any:
    """The benchmark's module of Hugging Face's side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts" / "bench"))
        yield import_module("generate_hf")


@pytest.fixture(scope="module")
def model(hf: Any) -> Emu35Model:
    single_process_mesh()
    built = build_model(replace(hf.MODEL, num_layers=2), vocabulary_size=V.size)
    initialize(built, seed=3, pad_id=V.pad)
    return built.eval()


def answers(model: Emu35Model, requests: list[Request]) -> list[list[int]]:
    engine = Engine(
        model=model,
        tokenizer=TOKENIZER,
        max_length=max(request.slots for request in requests),
        max_requests=len(requests),
    )
    for request in requests:
        engine.submit(request)
    return [list(answer.ids) for answer in engine.run()]


def test_guided_pictures_alone_and_in_a_ragged_batch(hf: Any, model: Emu35Model) -> None:
    pictures: list[Any] = []
    requests: list[Request] = []
    for caption, (height, width) in zip(CAPTIONS, GRIDS, strict=True):
        prompt = build_prompt(Task.t2i, caption, tokenizer=TOKENIZER)
        pictures.append(
            hf.Picture(
                prompt=prompt.conditional,
                unconditional=prompt.unconditional,
                height=height,
                width=width,
                guidance=3.0,
            )
        )
        grid = GridSize(height=height, width=width)
        requests.append(
            Request(
                prompt=prompt.conditional,
                unconditional=prompt.unconditional,
                grammar=GrammarOptions(size=grid, open_image=True),
                visual=COLD,
                guidance=3.0,
                max_new_tokens=grid.image_tokens,
                max_images=1,
            )
        )
    theirs_model = hf.hf_model(model)
    alone = hf.pictures_one_by_one(theirs_model, pictures=pictures, tokenizer=TOKENIZER)
    batched = hf.pictures_batched(theirs_model, pictures=pictures, tokenizer=TOKENIZER)
    assert hf.first_difference(answers(model, requests), theirs=alone) == ""
    assert hf.first_difference(batched, theirs=alone) == ""
    assert hf.first_difference(answers(model, requests[:1]), theirs=alone[:1]) == ""
    # A model that says the same whatever it is asked would pass with anything.
    assert all(len(set(answer)) > len(answer) / 2 for answer in alone)
    unguided = [replace(request, guidance=1.0) for request in requests]
    assert hf.first_difference(answers(model, unguided), theirs=alone) != ""


def test_text_alone_and_in_a_ragged_batch(hf: Any, model: Emu35Model) -> None:
    prompts = [[V.bos, *TOKENIZER.encode(caption)] for caption in CAPTIONS]
    theirs_model = hf.hf_model(model)
    batched = hf.text_batched(theirs_model, prompts=prompts, vocabulary=V, max_new_tokens=24)
    alone = [
        hf.text_batched(theirs_model, prompts=[prompt], vocabulary=V, max_new_tokens=24)[0]
        for prompt in prompts
    ]
    requests = [
        Request(prompt=prompt, text=COLD, max_new_tokens=24, grammar=GrammarOptions(images=False))
        for prompt in prompts
    ]
    ours = answers(model, requests)
    assert hf.first_difference(ours, theirs=batched) == ""
    assert hf.first_difference(ours, theirs=alone) == ""
    assert len({tuple(answer) for answer in ours}) == len(prompts)
