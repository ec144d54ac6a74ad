"""Requests that decode pictures in parallel, for the tiny model of tiny_engine."""

from functools import cache

import torch
from tiny_engine import TOKENIZER, V, mixed_requests, model, picture_request

from emu35.config.dida import PathConfig, PathKind
from emu35.dida.path import build_path
from emu35.dida.samplers import Sampler
from emu35.inference.denoise import Denoiser
from emu35.inference.denoiser import DenoiserSource
from emu35.inference.engine import Engine
from emu35.inference.request import DenoiseOptions, Generated, Request

STEPS = 5


@cache
def denoiser(kind: PathKind = PathKind.metric) -> Denoiser:
    codebook_KD = torch.randn(V.codebook_size, 8, generator=torch.Generator().manual_seed(1))
    return Denoiser(path=build_path(PathConfig(kind=kind), codebook_KD=codebook_KD))


def denoise_request(caption: str, **changes: object) -> Request:
    options = {name: changes.pop(name) for name in list(changes) if name in _OPTIONS}
    denoise = DenoiseOptions(**{"steps": STEPS, **options})  # type: ignore[arg-type]
    return picture_request(caption, denoise=denoise, **changes)


_OPTIONS = ("steps", "sampler", "guidance_until", "shift")


def denoise_engine(kind: PathKind = PathKind.metric, **numbers: int) -> Engine:
    values = {"max_requests": 8, "max_length": 400, **numbers}
    return Engine(model=model(), tokenizer=TOKENIZER, denoiser=denoiser(kind), **values)


def denoise_source() -> DenoiserSource:
    """A path that needs no codebook, as ranks are told of it."""
    return DenoiserSource(
        path=PathConfig(kind=PathKind.mixture_uniform), codes=V.codebook_size, folder=None
    )


def ranks_requests() -> list[Request]:
    """Every sampler, with guidance and without, and token by token between them."""
    ours = [
        denoise_request("a cat", seed=seed, sampler=sampler, guidance=1.0 + 2 * (seed % 2))
        for seed, sampler in enumerate(Sampler)
    ]
    return [*ours[:2], *mixed_requests()[:2], *ours[2:]]


def denoise(
    requests: list[Request], *, kind: PathKind = PathKind.metric, **numbers: int
) -> list[Generated]:
    engine = denoise_engine(kind, **numbers)
    for request in requests:
        engine.submit(request)
    return engine.run()
