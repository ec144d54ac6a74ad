"""Noise in the copies: each picture at a time of its own, each code from the path at that time."""

from dataclasses import dataclass, replace

import torch

from emu35.data.batch import Batch
from emu35.dida.path import Path
from emu35.dida.times import picture_shift, training_times
from emu35.parallel.noise import seed_for, uniform
from emu35.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Corruption:
    """What a batch with copies goes through before the model sees it.

    Everything drawn is a function of ``seed``, the number of the row in the global stream and the
    place in the row, so a resumed run and every layout of ranks see the same noise.

    Attributes:
        path: the probability path, on ``device``.
        shift, reference_codes: see :func:`~emu35.dida.times.picture_shift`.
        time: the time of all pictures, for validation; None draws one for each.
        purpose: whose noise it is; another purpose has other noise.
    """

    path: Path
    vocabulary: Vocabulary
    device: torch.device
    seed: int
    shift: float = 1.0
    reference_codes: int = 0
    time: float | None = None
    purpose: str = "training"

    def __call__(self, batch: Batch) -> Batch:
        """``batch`` (on the CPU) with noisy codes in its copies; all else stays."""
        assert batch.noisy is not None
        first = self.vocabulary.visual_start
        rows_N, columns_N = ((batch.noisy >= 0) & (batch.tokens >= first)).nonzero(as_tuple=True)
        if not len(rows_N):
            return batch
        samples_N = torch.tensor(batch.sample_ids)[rows_N]
        pictures_N = batch.noisy[rows_N, columns_N].long()
        times_N = self._times(rows_N, samples_N=samples_N, pictures_N=pictures_N)
        width = batch.tokens.shape[1]
        states_N = self.path.draw(
            (batch.tokens[rows_N, columns_N] - first).to(self.device),
            times_N=times_N.to(self.device),
            seeds_N=torch.full_like(rows_N, self._seed("codes")).to(self.device),
            positions_N=(samples_N * width + columns_N).to(self.device),
        ).cpu()
        ids_N = states_N + first
        if self.path.mask is not None:
            ids_N = ids_N.masked_fill(states_N == self.path.mask, mask_id(self.vocabulary))
        tokens_BS = batch.tokens.clone()
        tokens_BS[rows_N, columns_N] = ids_N
        return replace(batch, tokens=tokens_BS)

    def _seed(self, what: str) -> int:
        return seed_for(f"dida/{self.purpose}/{what}", seed=self.seed)

    def _times(
        self, rows_N: torch.Tensor, *, samples_N: torch.Tensor, pictures_N: torch.Tensor
    ) -> torch.Tensor:
        """The time of every token's picture, fp64 [N]."""
        if self.time is not None:
            return torch.full(rows_N.shape, self.time, dtype=torch.float64)
        names_N2 = torch.stack([rows_N, pictures_N], 1)
        _, picture_N, codes_P = names_N2.unique(dim=0, return_inverse=True, return_counts=True)
        shifts_P = torch.tensor(
            [
                picture_shift(codes, shift=self.shift, reference_codes=self.reference_codes)
                for codes in codes_P.tolist()
            ],
            dtype=torch.float64,
        )
        noise_N1 = uniform(
            torch.full_like(samples_N, self._seed("times")),
            positions_N=samples_N,
            ids_NM=pictures_N[:, None],
        )
        return training_times(noise_N1[:, 0], shifts_N=shifts_P[picture_N])


def mask_id(vocabulary: Vocabulary) -> int:
    """The id that the absorbing path shows for a masked code: EOF, which the release defines and
    never uses."""
    return vocabulary.eof
