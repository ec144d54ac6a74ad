"""Pictures on their way from noise: what a sequence keeps between two steps of denoising.

A canvas stands for the tokens ``IMG body`` of a picture, body being its codes and row ends, without
the EOI. Its hidden state number i predicts body token i, so that of IMG predicts the first code;
row ends are given, and what is predicted for them is not looked at.

Suffixes: L tokens of the canvas, N codes.
"""

from dataclasses import dataclass, field

import torch

from emu35.dida.samplers import Step
from emu35.dida.times import schedule
from emu35.inference.grammar import GridSize
from emu35.inference.request import DenoiseOptions
from emu35.tokens.vocabulary import Vocabulary


@dataclass(kw_only=True, slots=True, eq=False)
class Canvas:
    """One picture. All tensors lie on the engine's device: some forty bytes a code.

    Attributes:
        first: number of the first body token in the answer; draws are numbered by place in it.
        states_N: int64, the codes at the present time, or the path's mask.
        accepted_N: bool, see :mod:`emu35.dida.samplers`.
        logprobs_N, support_N: of the draw that each code was taken from.
        done: steps so far.
    """

    size: GridSize
    options: DenoiseOptions
    guided: bool
    first: int
    vocabulary: Vocabulary
    mask_id: int
    states_N: torch.Tensor
    accepted_N: torch.Tensor
    logprobs_N: torch.Tensor
    support_N: torch.Tensor
    done: int = 0
    _times: list[float] = field(init=False)
    _tokens_L: torch.Tensor = field(init=False)
    places_N: torch.Tensor = field(init=False)
    """Of every code in the body, which is that of the hidden state that predicts it."""

    def __post_init__(self) -> None:
        device = self.states_N.device
        self._times = schedule(self.options.steps, shift=self.options.shift).tolist()
        self.places_N = code_places(self.size, device=device)
        self._tokens_L = torch.full((self.length,), self.vocabulary.eol, device=device)
        self._tokens_L[0] = self.vocabulary.img

    @property
    def length(self) -> int:
        """Tokens of IMG and body."""
        return self.size.height * (self.size.width + 1)

    @property
    def slots(self) -> int:
        """Of the cache, from IMG on: for the tokens of the canvas and then for EOI."""
        return self.length + 1

    @property
    def step(self) -> Step:
        """The step to come."""
        return Step(
            number=self.done,
            count=self.options.steps,
            time=self._times[self.done],
            next=self._times[self.done + 1],
        )

    @property
    def guides(self) -> bool:
        """Whether the step to come looks at the unconditional stream."""
        # Times such as 0.2 are rounded in the schedule, and no step must fall to either side.
        return self.guided and self._times[self.done] < self.options.guidance_until - 1e-9

    @property
    def finished(self) -> bool:
        """Whether nothing is left to predict: the last step is done, or all codes are accepted."""
        return self.done > 0 and bool(self.accepted_N.all())

    def tokens(self) -> torch.Tensor:
        """The canvas as the model is fed it, int64 [L]; valid until the next call."""
        ids_N = self.states_N + self.vocabulary.visual_start
        # A mask lies behind the last code, and shows as another id.
        ids_N = ids_N.masked_fill(self.states_N >= self.vocabulary.codebook_size, self.mask_id)
        self._tokens_L[self.places_N + 1] = ids_N
        return self._tokens_L


def code_places(size: GridSize, *, device: torch.device | None = None) -> torch.Tensor:
    """Where in a body of rows, each but the last ended by EOL, the codes stand, int64 [N]."""
    rows_H1 = torch.arange(size.height, device=device)[:, None] * (size.width + 1)
    return (rows_H1 + torch.arange(size.width, device=device)).flatten()
