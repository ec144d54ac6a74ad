"""What parallel decoding takes of memory: the same at every step, and no scores of a whole picture.

Also: rows of adapters, which are told of canvases alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from denoise_engine import denoise_engine, denoise_request, denoiser
from dida_batches import copy_logits
from tiny_engine import TOKENIZER, V, build, mixed_requests, picture_request
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emu35.config import LoRAConfig
from emu35.dida.samplers import Sampler
from emu35.inference.engine import Engine
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.model.logits import RangeProjection, vocabulary_logits
from emu35.model.lora import adapted_linears, train_adapters

LARGE = GridSize(height=24, width=24)
WHOLE = GrammarOptions(open_image=True, size=LARGE)


class Allocations(TorchDispatchMode):
    """The bytes of every new storage that an operation makes, the largest ones kept."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr()
            for each in tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor)
        }
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage.data_ptr() not in given:
                    self.sizes.append(storage.nbytes())
        return found


@contextmanager
def watched(engine: Engine) -> Iterator[Callable[[], tuple[int, int]]]:
    """Tells where the ids of the one forward lay that was made, and the scores of its canvases."""
    fed: set[int] = set()
    scored: list[int] = []
    project = RangeProjection.__call__

    def note_scores(self: RangeProjection, hidden_CH: torch.Tensor) -> torch.Tensor:
        scores_CK = project(self, hidden_CH)
        scored.append(scores_CK.untyped_storage().data_ptr())
        return scores_CK

    def note_ids(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        fed.add(given[0].untyped_storage().data_ptr())

    def place() -> tuple[int, int]:
        assert len(scored) >= 2, "two canvases"
        ((ids,), (scores,)) = fed, set(scored)
        return ids, scores

    hook = engine.model.register_forward_pre_hook(note_ids)
    RangeProjection.__call__ = note_scores
    try:
        yield place
    finally:
        hook.remove()
        RangeProjection.__call__ = project


@pytest.mark.parametrize("sampler", list(Sampler))
def test_a_step_takes_its_memory_where_the_one_before_it_did(sampler: Sampler) -> None:
    engine = denoise_engine(max_length=800, max_requests=2)
    for seed in range(2):
        engine.submit(
            denoise_request(
                "a cat",
                seed=seed,
                grammar=WHOLE,
                max_new_tokens=700,
                guidance_until=1.0,
                sampler=sampler,
                steps=6,
            )
        )
    for _ in range(2):
        engine.step()  # prompts are read, and everything is warm
    places: list[tuple[int, int]] = []
    totals: list[int] = []
    for _ in range(3):
        with Allocations() as made, watched(engine) as place:
            engine.step()
        places.append(place())
        totals.append(sum(size for size in made.sizes if size > 1 << 16))
    assert len(set(places)) == 1, "ids and scores lie where those of the step before lay"
    assert totals[1:] == pytest.approx(totals[:-1], rel=0.25)
    canvases = [sequence.canvas for sequence in engine._scheduler.active]
    assert all(canvas is not None and canvas.done == 5 for canvas in canvases), "in the middle"


def test_scores_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of a fortieth of a picture, nothing in a step is as large as its scores, and the
    picture is the same."""
    request = denoise_request("a cat", grammar=WHOLE, max_new_tokens=700, guidance=1.0, steps=3)
    answers = []
    for scores in (1 << 22, 16 * V.codebook_size):
        monkeypatch.setattr("emu35.inference.denoise.SCORES", scores)
        monkeypatch.setattr("emu35.dida.path.SCORES", scores)
        engine = denoise_engine(max_length=800, max_requests=1)
        engine.submit(request)
        engine.step()
        with torch.inference_mode():
            hidden = engine._run(engine._scheduler.feed())
            with Allocations() as made:
                engine._denoise(hidden)
        answers.append((max(made.sizes), engine.run()[0].ids))
    whole = LARGE.height * LARGE.width * V.codebook_size * 4
    assert answers[0][0] >= whole
    assert answers[1][0] < whole / 10
    assert answers[0][1] == answers[1][1]


def adapted_model() -> Any:
    model = build()
    train_adapters(model, config=LoRAConfig(rank=4, alpha=8.0), seed=1, noisy_only=True)
    for linear in adapted_linears(model).values():
        assert linear.adapter is not None
        torch.nn.init.normal_(linear.adapter.b, std=0.3)
    return model.eval()


def test_adapters_of_noisy_copies_add_to_canvases_and_to_nothing_else() -> None:
    model = adapted_model()
    engine = Engine(model=model, tokenizer=TOKENIZER, max_length=200, denoiser=denoiser())
    engine.submit(denoise_request("a cat", guidance=1.0))
    for request in mixed_requests()[:2]:
        engine.submit(request)
    feeds = []
    with torch.inference_mode():
        engine._scheduler.admit()
        sequence = engine._scheduler.active[0]
        assert engine._denoising is not None
        sequence.canvas = engine._denoising.begin(sequence)
        feeds = engine._scheduler.feed()
        ids = sequence.canvas.tokens().tolist()
        hidden = engine._run(feeds)
    cached = vocabulary_logits(model, hidden_NH=hidden[sequence.conditional])
    prefix = sequence.conditional.tokens[:-1]
    adapted, base = (
        copy_logits(model, prefix=prefix, canvas=ids, tokenizer=TOKENIZER, adapted=adapted)
        for adapted in (True, False)
    )
    torch.testing.assert_close(cached, adapted, atol=2e-4, rtol=1e-4)
    assert (cached - base).abs().max() > 0.1, "the adapters have learned something"


def test_token_by_token_is_bit_for_bit_the_base_with_adapters_of_noisy_copies() -> None:
    answers = []
    for model in (build(), adapted_model()):
        engine = Engine(model=model, tokenizer=TOKENIZER, max_length=200, denoiser=denoiser())
        for request in (*mixed_requests(), picture_request("a cat", seed=5)):
            engine.submit(request)
        answers.append([(a.ids, [token.logprob for token in a.tokens]) for a in engine.run()])
    assert answers[0] == answers[1]
