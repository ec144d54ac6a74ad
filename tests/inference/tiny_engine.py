"""A tiny model with strong opinions, requests of every kind, and the plain way to answer them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from tiny_models import tiny_lm

from emu35.config import ParallelConfig
from emu35.inference.engine import Engine
from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, NextKind, SizeIds
from emu35.inference.request import Generated, Request
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
    """The whole model in this process."""
    single_process_mesh()
    return build()


def build(parallel: ParallelConfig | None = None, **changes: object) -> Emu35Model:
    """The model, or this rank's part of it; the weights are the same in every layout."""
    # A wide initialisation makes the distributions far from uniform: greedy ties are unlikely and
    # the two streams disagree.
    built = build_model(tiny_lm(init_std=0.3, **changes), vocabulary_size=V.size, parallel=parallel)
    initialize(built, seed=3, pad_id=V.pad)
    return built.eval()


@torch.no_grad()
def full_logits(ids: Sequence[int]) -> torch.Tensor:
    """Logits [1, V] after ``ids`` on the CPU, without any cache."""
    tokens_1S = torch.tensor([list(ids)], device=model().output_weight.device)
    context = AttentionContext(
        positions_BS=torch.arange(len(ids), device=tokens_1S.device)[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_1S)),
    )
    hidden_S1H = model()(tokens_1S, context=context)
    return vocabulary_logits(model(), hidden_NH=hidden_S1H[-1]).cpu()


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
    return picture_request(caption, **{"grammar": GrammarOptions(size=SMALL), **changes})


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
