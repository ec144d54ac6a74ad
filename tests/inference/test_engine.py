"""The engine against the plain way: one sequence, the whole prefix through the model each time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from emu35.config import LMConfig
from emu35.errors import ConfigError
from emu35.inference.engine import Engine
from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, NextKind, SizeIds
from emu35.inference.request import Finish, Generated, Request
from emu35.inference.sampler import EVERYTHING, draw, guide
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.tokens.template import Sampling
from emu35.tokens.text import ByteTokenizer
from emu35.tokens.vocabulary import Vocabulary

TOKENIZER = ByteTokenizer(vocabulary=Vocabulary(n_text=256, codebook_size=64))
V = TOKENIZER.vocabulary
SMALL = GridSize(height=2, width=3)
PICTURE = GrammarOptions(open_image=True, size=SMALL)


def sampling(**numbers: float) -> Sampling:
    return replace(EVERYTHING, **numbers)  # type: ignore[arg-type]


@cache
def model() -> Emu35Model:
    # A wide initialisation makes the distributions far from uniform: greedy ties are unlikely and
    # the two streams disagree.
    config = LMConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=16,
        init_std=0.3,
    )
    single_process_mesh()
    built = build_model(config, vocabulary_size=V.size)
    initialize(built, seed=3, pad_id=V.pad)
    return built.eval()


@torch.no_grad()
def full_logits(ids: Sequence[int]) -> torch.Tensor:
    """Logits [1, V] after ``ids``, without any cache."""
    tokens_1S = torch.tensor([list(ids)])
    context = AttentionContext(
        positions_BS=torch.arange(len(ids))[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_1S)),
    )
    hidden_S1H = model()(tokens_1S, context=context)
    return vocabulary_logits(model(), hidden_NH=hidden_S1H[-1])


def plain_generate(request: Request) -> list[int]:
    """The oracle: no cache, no batch, no shortcut for forced tokens, guidance on log-probabilities
    over the whole vocabulary."""
    machine = Grammar(vocabulary=V, size_ids=SizeIds.of(TOKENIZER), options=request.grammar)
    seen, unconditional = list(request.prompt), list(request.unconditional)
    ids: list[int] = []
    while len(ids) < request.max_new_tokens:
        step = machine.next(room=request.max_new_tokens - len(ids))
        numbers = request.text if step.kind is NextKind.TEXT else request.visual
        if step.kind is NextKind.FORCED:
            token = step.ids[0]
        else:
            scores = full_logits(seen)
            if step.kind is NextKind.VISUAL and request.guidance != 1:
                scores = guide(
                    scores, unconditional_NV=full_logits(unconditional), scale=request.guidance
                )
            illegal = [id for id in range(V.size) if id not in step]
            scores[:, illegal] = -torch.inf
            drawn = draw(
                scores,
                sampling=numbers,
                seeds_N=torch.tensor([request.seed]),
                positions_N=torch.tensor([len(ids)]),
            )
            token = int(drawn.columns_N)
        ids.append(token)
        seen.append(token)
        if machine.accept(token):
            unconditional.append(token)
        if token == V.eos or (request.max_images and machine.images == request.max_images):
            break
    return ids


def generate(requests: list[Request], *, at_once: int, chunk: int = 256) -> list[Generated]:
    engine = Engine(
        model=model(),
        tokenizer=TOKENIZER,
        max_requests=at_once,
        max_length=max(request.slots for request in requests),
        prefill_chunk=chunk,
    )
    for request in requests:
        engine.submit(request)
    return engine.run()


def picture_request(caption: str, **changes: object) -> Request:
    values: dict[str, object] = {
        "prompt": [V.bos, *TOKENIZER.encode(caption)],
        "unconditional": [V.bos],
        "grammar": PICTURE,
        "guidance": 3.0,
        "visual": sampling(top_k=20),
        "max_new_tokens": 40,
        "max_images": 1,
    }
    return Request(**{**values, **changes})  # type: ignore[arg-type]


def text_request(caption: str, **changes: object) -> Request:
    return picture_request(caption, grammar=GrammarOptions(size=SMALL), **changes)


def mixed_requests() -> list[Request]:
    """Ragged prompts; pictures, prose, free sizes; guided or not; sampled or greedy."""
    cold = sampling(temperature=0)
    return [
        picture_request("a red circle", seed=1),
        picture_request("two", seed=2, guidance=1.0, unconditional=()),
        picture_request("a much longer caption than the others have", seed=3, guidance=1.5),
        picture_request("greedy", visual=cold, unconditional=[V.bos, *b"no picture at all"]),
        text_request("prose", seed=4, max_images=0, text=sampling(top_p=0.9, top_k=100)),
        text_request("cold prose", seed=5, max_images=0, text=cold, guidance=1.0),
        picture_request(
            "free size",
            seed=6,
            grammar=GrammarOptions(open_image=True, min_digits=1),
            max_new_tokens=60,
        ),
    ]


def test_engine_equals_the_plain_way() -> None:
    requests = mixed_requests()
    expected = [plain_generate(request) for request in requests]
    assert [answer.ids for answer in generate(requests, at_once=14)] == expected


@pytest.mark.parametrize(("at_once", "chunk"), [(1, 256), (2, 5), (3, 1), (64, 256)])
def test_answers_do_not_depend_on_batch_or_chunk(at_once: int, chunk: int) -> None:
    """Few at a time make requests wait and take over the slots of others."""
    requests = mixed_requests()
    expected = [answer.ids for answer in generate(requests, at_once=14)]
    assert [answer.ids for answer in generate(requests, at_once=at_once, chunk=chunk)] == expected


def test_a_picture_comes_out_as_a_document() -> None:
    (answer,) = generate([picture_request("a cat")], at_once=2)
    assert answer.finish is Finish.images
    assert [codes.shape for codes in answer.document.images] == [(2, 3)]
    assert len(answer.ids) == SMALL.image_tokens
    assert not answer.document.problems


def test_an_image_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image of 2\*3 codes has 13 tokens.*max_new_tokens=9"):
        generate([picture_request("a cat", max_new_tokens=9)], at_once=2)


def test_guidance_changes_the_picture_and_the_unconditional_prompt_matters() -> None:
    base = picture_request("a cat", visual=sampling(temperature=0), guidance=4.0)
    other = picture_request(
        "a cat", visual=sampling(temperature=0), guidance=4.0, unconditional=[V.bos, *b"dog"]
    )
    plain = picture_request("a cat", visual=sampling(temperature=0), guidance=1.0)
    answers = generate([base, other, plain], at_once=8)
    assert len({tuple(answer.ids) for answer in answers}) == 3


def test_seeds_decide() -> None:
    same, again, other = (
        answer.ids
        for answer in generate([picture_request("a", seed=s) for s in (7, 7, 8)], at_once=6)
    )
    assert same == again != other


def test_stories_repeat_the_size_of_their_first_image() -> None:
    stories = [
        picture_request(
            "story",
            grammar=GrammarOptions(open_image=True, min_digits=1),
            max_images=0,
            guidance=1.0,
            max_new_tokens=400,
            seed=seed,
        )
        for seed in range(24)
    ]
    shapes = [
        [codes.shape for codes in answer.document.images]
        for answer in generate(stories, at_once=24)
    ]
    assert any(len(sizes) > 1 for sizes in shapes), "no story has a second image"
    assert all(len(set(sizes)) == 1 for sizes in shapes)


def test_an_engine_can_be_used_again() -> None:
    requests = mixed_requests()
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_requests=14, max_length=200)
    for request in requests:
        engine.submit(request)
    first = engine.run()
    for request in requests:
        engine.submit(request)
    second = engine.run()
    assert [a.ids for a in first] == [a.ids for a in second]
    assert [a.index for a in second] == list(range(len(requests), 2 * len(requests)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt has no tokens"),
        ({"unconditional": ()}, "needs an unconditional prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 10_000}, "exceed the engine's length"),
        ({"visual": sampling(top_p=0)}, "image top-p"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, object], message: str) -> None:
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_requests=4, max_length=100)
    with pytest.raises(ConfigError, match=message):
        engine.submit(picture_request("a cat", **changes))
    assert not engine.busy


def test_distributions_of_the_tiny_model_are_not_flat() -> None:
    """The comparisons above would prove little if every prefix gave the same logits."""
    prompts: list[Callable[[], torch.Tensor]] = [
        lambda: full_logits([V.bos, *b"one"]),
        lambda: full_logits([V.bos, *b"another"]),
    ]
    one, another = (prompt().log_softmax(-1) for prompt in prompts)
    assert (one - another).abs().max() > 0.5
