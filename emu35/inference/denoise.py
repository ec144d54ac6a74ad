"""Parallel decoding of pictures: from hidden states of canvases to the next canvases.

A step of the engine feeds every canvas to the model, once a stream, and hands the hidden states to
:class:`Denoising`, which guides them, projects them on the visual ids, draws an x1 for every code
and lets the request's sampler (:mod:`emu35.dida.samplers`) make the next canvas of it. Canvases are
taken one after another and their codes in chunks, so that scores never take more memory than one
chunk, and so that a picture comes out alike whatever else is in flight.

Suffixes: L tokens of a canvas, N codes of it, C codes of a chunk, H hidden size, K codebook size.
"""

from dataclasses import dataclass

import torch

from emu35.dida.corrupt import mask_id
from emu35.dida.path import SCORES, Path
from emu35.dida.samplers import Prediction, Sampler, advance, begin, draw_seed, entropy
from emu35.errors import ConfigError
from emu35.inference.canvas import Canvas
from emu35.inference.grammar import NextKind
from emu35.inference.ranks import agree_on_tensor
from emu35.inference.request import Token
from emu35.inference.sampler import Drawn, draw, guide_hidden
from emu35.inference.scheduler import Sequence
from emu35.model.logits import RangeProjection
from emu35.model.transformer import Emu35Model
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoiser:
    """What parallel decoding needs beside the model: the path that it was adapted to, on the
    model's device. Under tensor parallelism every rank has the whole path (no ``group``)."""

    path: Path


class Denoising:
    """Begins canvases and takes their steps. ``steps`` and ``images`` count what is done.

    Raises:
        ConfigError: the path is of another codebook than the vocabulary.
    """

    def __init__(self, model: Emu35Model, *, vocabulary: Vocabulary, denoiser: Denoiser) -> None:
        size = denoiser.path.codebook_size
        if size != vocabulary.codebook_size:
            raise ConfigError(
                f"the denoiser's codebook has {size} codes, but the vocabulary "
                f"{vocabulary.codebook_size}; use the image tokenizer that the model was "
                "adapted with"
            )
        self.steps = self.images = 0
        self._path = denoiser.path
        self._vocabulary = vocabulary
        self._project = RangeProjection(
            model,
            start=vocabulary.visual_start,
            end=vocabulary.size,
            count=max(1, SCORES // size),
        )
        self._device = model.output_weight.device

    def begin(self, sequence: Sequence) -> Canvas:
        """The canvas of the picture at whose first code ``sequence`` stands, at time 0."""
        size, options = sequence.grammar.size, sequence.request.denoise
        assert size is not None
        assert options is not None
        codes = size.height * size.width
        positions_N = torch.arange(codes, device=self._device) + len(sequence.tokens)
        return Canvas(
            size=size,
            options=options,
            guided=sequence.unconditional is not None,
            first=len(sequence.tokens),
            vocabulary=self._vocabulary,
            mask_id=mask_id(self._vocabulary),
            states_N=begin(self._path, seed=sequence.request.seed, positions_N=positions_N),
            accepted_N=torch.zeros(codes, dtype=torch.bool, device=self._device),
            logprobs_N=torch.zeros(codes, device=self._device),
            support_N=torch.ones(codes, dtype=torch.int64, device=self._device),
        )

    def step(
        self,
        sequence: Sequence,
        *,
        conditional_LH: torch.Tensor,
        unconditional_LH: torch.Tensor | None,
    ) -> list[Token] | None:
        """Advance the canvas of ``sequence`` by the hidden states of its tokens, of both streams
        where this step is guided; the codes in order once it is finished.

        Raises:
            CheckpointError: the logits are not finite.
        """
        canvas = sequence.canvas
        assert canvas is not None
        drawn = self._predict(
            sequence, conditional_LH=conditional_LH, unconditional_LH=unconditional_LH
        )
        advanced = advance(
            canvas.options.sampler,
            path=self._path,
            states_N=canvas.states_N,
            accepted_N=canvas.accepted_N,
            prediction=drawn.prediction,
            step=canvas.step,
            seed=sequence.request.seed,
            positions_N=self._positions(canvas),
        )
        taken_N = advanced.taken_N
        canvas.states_N = agree_on_tensor(advanced.states_N)
        canvas.accepted_N = agree_on_tensor(advanced.accepted_N)
        canvas.logprobs_N = torch.where(taken_N, drawn.prediction.logprobs_N, canvas.logprobs_N)
        canvas.support_N = torch.where(taken_N, drawn.support_N, canvas.support_N)
        canvas.done += 1
        self.steps += 1
        if not canvas.finished:
            return None
        self.images += 1
        agree_on_tensor(canvas.logprobs_N)
        agree_on_tensor(canvas.support_N)
        return _tokens(canvas)

    def _positions(self, canvas: Canvas) -> torch.Tensor:
        """Numbers of the codes among all that are drawn for one answer, int64 [N]."""
        return torch.arange(len(canvas.states_N), device=self._device) + canvas.first

    def _predict(
        self,
        sequence: Sequence,
        *,
        conditional_LH: torch.Tensor,
        unconditional_LH: torch.Tensor | None,
    ) -> "_Drawn":
        canvas, request = sequence.canvas, sequence.request
        assert canvas is not None
        bounded = canvas.options.sampler is Sampler.entropy_bound
        first = self._vocabulary.visual_start
        positions_N = self._positions(canvas)
        seeds_N = torch.full_like(positions_N, draw_seed(request.seed, step=canvas.step))
        scale_11 = torch.full((1, 1), request.guidance, device=self._device)
        parts: list[Drawn] = []
        entropies: list[torch.Tensor] = []
        for begins in range(0, len(positions_N), self._project.count):
            part = slice(begins, begins + self._project.count)
            places_C = canvas.places_N[part]
            hidden_CH = conditional_LH[places_C]
            if unconditional_LH is not None:
                hidden_CH = guide_hidden(
                    hidden_CH, unconditional_NH=unconditional_LH[places_C], scale_N1=scale_11
                )
            scores_CK = self._project(hidden_CH)
            drawn = draw(
                scores_CK,
                sampling=request.visual,
                seeds_N=seeds_N[part],
                positions_N=positions_N[part],
                ids=range(first, first + scores_CK.shape[1]),
            )
            parts.append(drawn)
            if bounded:
                # Of all codes: top-k and top-p cut off what they take to be unlikely, which says
                # nothing of how sure the network is.
                entropies.append(entropy(scores_CK / (request.visual.temperature or 1.0)))
        return _Drawn(
            prediction=Prediction(
                codes_N=torch.cat([part.columns_N for part in parts]),
                logprobs_N=torch.cat([part.logprobs_N for part in parts]),
                entropies_N=torch.cat(entropies) if bounded else None,
            ),
            support_N=torch.cat([part.support_N for part in parts]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """A prediction, and among how many candidates each code was drawn, int64 [N]."""

    prediction: Prediction
    support_N: torch.Tensor


def _tokens(canvas: Canvas) -> list[Token]:
    first = canvas.vocabulary.visual_start
    numbers = zip(
        canvas.states_N.tolist(), canvas.logprobs_N.tolist(), canvas.support_N.tolist(), strict=True
    )
    return [
        Token(
            id=first + code, kind=NextKind.VISUAL, logprob=logprob, support=support, denoised=True
        )
        for code, logprob, support in numbers
    ]
