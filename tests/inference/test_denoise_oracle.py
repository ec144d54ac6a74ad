"""Every step of a canvas replayed the plain way: no cache, scores of the whole vocabulary, guidance
on log-probabilities, and what was drawn handed to the sampler."""

from dataclasses import dataclass
from itertools import product

import torch
from denoise_engine import denoise, denoise_request, denoiser
from dida_batches import copy_logits
from tiny_engine import TOKENIZER, V, model, sampling

from emu35.config.dida import PathKind
from emu35.dida.corrupt import mask_id
from emu35.dida.samplers import (
    Advanced,
    Prediction,
    Sampler,
    Step,
    advance,
    begin,
    draw_seed,
    entropy,
)
from emu35.dida.times import schedule
from emu35.inference.grammar import Grammar, GrammarOptions, GridSize, SizeIds
from emu35.inference.request import Generated, Request
from emu35.inference.sampler import draw, guide

SIZE = GridSize(height=3, width=4)
CODES = SIZE.height * SIZE.width


@dataclass(kw_only=True)
class Replayed:
    """Codes of one picture, and the log-probability and support of each."""

    states_N: torch.Tensor
    logprobs_N: torch.Tensor
    support_N: torch.Tensor


def canvas_ids(states_N: torch.Tensor) -> list[int]:
    """IMG and body as the model reads them."""
    ids = [V.visual_start + state if state < V.codebook_size else mask_id(V) for state in states_N]
    rows = [ids[start : start + SIZE.width] for start in range(0, CODES, SIZE.width)]
    return [V.img, *(id for row in rows for id in [*row, V.eol])][:-1]


def scores(
    request: Request, *, answer: list[int], states_N: torch.Tensor, time: float
) -> torch.Tensor:
    """Of the codes alone, [N, K], guided until the time where guidance ends."""
    canvas = [int(id) for id in canvas_ids(states_N)]
    places = [row * (SIZE.width + 1) + column for row in range(3) for column in range(4)]
    # The unconditional stream sees the pictures of the answer and not its words.
    machine = Grammar(vocabulary=V, size_ids=SizeIds.of(TOKENIZER), options=request.grammar)
    wordless = [id for id in answer if machine.accept(id)]
    conditional_NV, unconditional_NV = (
        copy_logits(model(), prefix=prefix, canvas=canvas, tokenizer=TOKENIZER)[places]
        for prefix in ([*request.prompt, *answer], [*request.unconditional, *wordless])
    )
    assert request.denoise is not None
    guided_NV = conditional_NV.log_softmax(-1)
    if time < request.denoise.guidance_until:
        guided_NV = guide(conditional_NV, unconditional_NV=unconditional_NV, scale=request.guidance)
    return guided_NV[:, V.visual_start :]


def replay(request: Request, *, kind: PathKind, answer: list[int]) -> Replayed:
    """The picture that follows ``answer``, whose last token is the one before IMG."""
    options, path = request.denoise, denoiser(kind).path
    assert options is not None
    positions_N = torch.arange(CODES) + len(answer) + 1
    states_N = begin(path, seed=request.seed, positions_N=positions_N)
    accepted_N = torch.zeros(CODES, dtype=torch.bool)
    found = Replayed(
        states_N=states_N, logprobs_N=torch.zeros(CODES), support_N=torch.ones(CODES).long()
    )
    times = schedule(options.steps, shift=options.shift).tolist()
    for number in range(options.steps):
        step = Step(number=number, count=options.steps, time=times[number], next=times[number + 1])
        scores_NK = scores(request, answer=answer, states_N=found.states_N, time=step.time)
        drawn = draw(
            scores_NK,
            sampling=request.visual,
            seeds_N=torch.full_like(positions_N, draw_seed(request.seed, step=step)),
            positions_N=positions_N,
            ids=range(V.visual_start, V.size),
        )
        advanced: Advanced = advance(
            options.sampler,
            path=path,
            states_N=found.states_N,
            accepted_N=accepted_N,
            prediction=Prediction(
                codes_N=drawn.columns_N,
                logprobs_N=drawn.logprobs_N,
                entropies_N=entropy(scores_NK / request.visual.temperature),
            ),
            step=step,
            seed=request.seed,
            positions_N=positions_N,
        )
        accepted_N, taken_N = advanced.accepted_N, advanced.taken_N
        found.states_N = advanced.states_N
        found.logprobs_N = torch.where(taken_N, drawn.logprobs_N, found.logprobs_N)
        found.support_N = torch.where(taken_N, drawn.support_N, found.support_N)
        if bool(accepted_N.all()):
            break
    return found


def pictures(answer: Generated) -> list[tuple[int, Replayed]]:
    """Every picture: the place of its IMG in the answer, and what the tokens say of its codes."""
    found = []
    for place, token in enumerate(answer.tokens):
        if token.id == V.img:
            codes = [t for t in answer.tokens[place : place + SIZE.image_tokens] if t.denoised]
            found.append(
                (
                    place,
                    Replayed(
                        states_N=torch.tensor([t.id - V.visual_start for t in codes[:CODES]]),
                        logprobs_N=torch.tensor([t.logprob for t in codes[:CODES]]),
                        support_N=torch.tensor([t.support for t in codes[:CODES]]),
                    ),
                )
            )
    return found


SETTINGS = [
    (PathKind.metric, {"guidance_until": 0.6, "visual": sampling(top_k=20)}),
    (
        PathKind.mixture_uniform,
        {"guidance_until": 1.0, "shift": 2.0, "visual": sampling(temperature=0.7, top_p=0.9)},
    ),
    (
        PathKind.absorbing,
        {"guidance_until": 0.3, "shift": 0.5, "visual": sampling(temperature=1.3)},
    ),
]


def test_pictures_are_what_a_plain_replay_makes() -> None:
    later = 0
    for seed, (sampler, (kind, settings)) in enumerate(product(Sampler, SETTINGS)):
        request = denoise_request(
            "story",
            seed=seed,
            grammar=GrammarOptions(size=SIZE, open_image=True),
            sampler=sampler,
            steps=4,
            guidance=2.5,
            max_images=2,
            max_new_tokens=300,
            **settings,
        )
        (answer,) = denoise([request], kind=kind)
        made = pictures(answer)
        later += len(made) - 1
        for place, found in made:
            expected = replay(request, kind=kind, answer=answer.ids[:place])
            assert torch.equal(found.states_N, expected.states_N)
            assert torch.equal(found.support_N, expected.support_N)
            torch.testing.assert_close(found.logprobs_N, expected.logprobs_N, atol=1e-3, rtol=1e-3)
    assert later, "no document has a second picture, whose draws are others"
