"""A trainer's side of rollouts by servers, and what it should get."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from emu35.checkpoint.gathered import GatheredWeights
from emu35.config import Precision
from emu35.config.grpo import RolloutConfig
from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Generated, Request
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import current_mesh
from emu35.stages.grpo.remote import RemoteEngine
from emu35.stages.grpo.replica import Replica
from emu35.tokens.template import Sampling
from emu35.tokens.text import TextTokenizer

# In fp32: what shares a batch must not matter to the last bit of a choice.
UPDATED: dict[str, Any] = {"weight_updates": True, "precision": Precision.fp32}
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0)


def requests(tokenizer: TextTokenizer) -> list[Request]:
    """Everything that a request can say."""
    vocabulary = tokenizer.vocabulary
    ask = [vocabulary.bos, *tokenizer.encode("a red circle")]
    picture = Request(
        prompt=ask,
        unconditional=[vocabulary.bos],
        grammar=GrammarOptions(size=GridSize(height=3, width=4), open_image=True),
        text=PLAIN,
        visual=PLAIN,
        seed=11,
        max_new_tokens=60,
        max_images=1,
    )
    kept = Sampling(temperature=1.3, top_k=7, top_p=0.9)
    free = GrammarOptions(min_digits=1, same_size=False)
    return [
        picture,
        replace(picture, guidance=2.5, seed=2**62),
        replace(picture, guidance=3.0, visual=kept, keep_candidates=True, seed=13),
        replace(picture, grammar=free, max_images=0, max_new_tokens=90, seed=14),
        replace(
            picture, grammar=GrammarOptions(images=False), text=kept, max_images=0, seed=15,
            max_new_tokens=7, keep_candidates=True,
        ),
        *(
            replace(
                picture, grammar=GrammarOptions(stray_layout=True, images=False), max_images=0,
                stop=tuple("abcdefghijklmnop"), seed=seed,
            )
            for seed in range(20, 26)
        ),
        replace(picture, top_logprobs=2, seed=17),
    ]  # fmt: skip


def embedded(model: Emu35Model, asked: list[Request], tokenizer: TextTokenizer) -> list[Generated]:
    engine = Engine(model=model, tokenizer=tokenizer, max_length=256, max_requests=8)
    for request in asked:
        engine.submit(request)
    return engine.run()


class Trainer:
    """A trainer's side: the engine, and the number of its updates."""

    def __init__(self, model: Emu35Model, tokenizer: TextTokenizer, **config: Any) -> None:
        self.version = 1
        mesh = current_mesh()
        self.engine = RemoteEngine(
            config=RolloutConfig(**{"timeout": 30.0, "bucket_bytes": 40_000} | config),
            tokenizer=tokenizer,
            replica=Replica(mesh=mesh),
            weights=GatheredWeights([model], mesh=mesh),
            gather_parameters=lambda: None,
            version=lambda: self.version,
        )

    def sample(self, asked: list[Request]) -> list[Generated]:
        engine = self.engine
        engine.prepare(asked)
        numbers = [engine.submit(request) for request in asked]
        found: dict[int, Generated] = {}
        while engine.busy:
            found |= {answer.index: answer for answer in engine.step()}
        engine.release()
        return [found[number] for number in numbers]


def assert_same(found: list[Generated], expected: list[Generated]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.ids == other.ids
        assert [token.kind for token in one.tokens] == [token.kind for token in other.tokens]
        assert one.finish is other.finish
        assert len(one.document.images) == len(other.document.images)
        for token, wanted in zip(one.tokens, other.tokens, strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert (token.support, token.forced) == (wanted.support, wanted.forced)
            if token.forced:
                assert token.logprob == 0
            assert (token.candidates is None) == (wanted.candidates is None)
            if token.candidates is not None and wanted.candidates is not None:
                assert np.array_equal(token.candidates, wanted.candidates)
