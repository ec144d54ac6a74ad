"""The entropies of q = softmax(L / temperature) and their gradients at the logits.

At a temperature of 0.01, codes whose logits lie 0.3 below a vector's best have less than 1e-13 of
its probability. While training starts, at 131,072 rows, that leaves a few dozen codes a vector. The
first walk over the codebook notes them (:class:`Candidates`), and what follows takes no further
walk. Their logits are computed once more in fp64: rounding in fp32, divided by 0.01, would be the
largest error of all. Where there are too many, in young codebooks whose logits are all alike or at
high temperatures, :func:`dense_entropies` walks the codebook a second time instead.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from emu35.vision.ibq.chunks import BITS, Chunks, exponent_floor
from emu35.vision.ibq.entropy import (
    EntropySettings,
    EntropyTerms,
    entropy_and_slope,
    mean_over_ranks,
)

CANDIDATE_SHARE = 1 / 64
"""Of all logits, above which a walk over the codebook is cheaper than a list."""

MOST_CANDIDATES = 1 << 21
"""Longest list: 100 MiB."""

CANDIDATES_AT_ONCE = 1 << 13
"""Candidates whose logits are computed together, in fp64."""


class EntropyGradient(Protocol):
    """What remembers how the entropies depend on the logits."""

    def add(
        self,
        grad_NC: torch.Tensor,
        *,
        rows: slice,
        relative_NC: torch.Tensor,
        room_NC: torch.Tensor,
        sample: torch.Tensor,
        codebook: torch.Tensor,
    ) -> None:
        """Add what the entropies send to the logits of ``rows``; ``sample`` and ``codebook`` are
        the gradients that arrive at them. ``relative_NC``, the logits less the largest, and
        ``room_NC`` may be written over."""
        ...


class Candidates:
    """Codes whose logits come close to a vector's best, noted chunk by chunk."""

    def __init__(self, chunks: Chunks, *, temperature: float) -> None:
        vectors, rows = chunks.z_ND.shape[0], chunks.codebook_KD.shape[0]
        self.limit = min(MOST_CANDIDATES, int(CANDIDATE_SHARE * vectors * rows))
        self.temperature = temperature
        self.reach = temperature * reach(chunks.z_ND.dtype)
        self.count = 0
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @property
    def too_many(self) -> bool:
        return self.count > self.limit

    def update(
        self,
        logits_NC: torch.Tensor,
        *,
        start: int,
        chunk_best_N: torch.Tensor,
        best_N: torch.Tensor,
    ) -> None:
        """Note those of one chunk, whose first row is ``start``, given the best logits so far."""
        if self.too_many:
            return
        floor_N = best_N - self.reach
        near_M = (chunk_best_N >= floor_N).nonzero()[:, 0]
        near_MC = logits_NC[near_M]
        place_P, column_P = (near_MC >= floor_N[near_M, None]).nonzero().unbind(1)
        self._parts.append((near_M[place_P], column_P + start, near_MC[place_P, column_P]))
        self.count += len(place_P)
        if self.too_many:
            self._parts = []

    def close_to(self, best_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors and codes of those that are still close to the final best logits."""
        vector_P, code_P, logit_P = (torch.cat(part) for part in zip(*self._parts, strict=True))
        stays_P = logit_P >= best_N[vector_P] - self.reach
        return vector_P[stays_P], code_P[stays_P]


def reach(dtype: torch.dtype) -> float:
    """Nats below the best that count: beyond, even a million codes together are within rounding."""
    return math.log(1e6) - math.log(torch.finfo(dtype).eps)


# ------------------------------------------------------------------------- listed


@dataclass(kw_only=True, slots=True)
class ListedGradient:
    """Derivatives of both entropies at the logits of the candidates, which are in chunk order;
    chunk i has those from ``bounds[i]`` to ``bounds[i + 1]``."""

    vector_P: torch.Tensor
    code_P: torch.Tensor
    sample_P: torch.Tensor
    codebook_P: torch.Tensor
    bounds: list[int]
    rows: int

    def add(
        self,
        grad_NC: torch.Tensor,
        *,
        rows: slice,
        relative_NC: torch.Tensor,
        room_NC: torch.Tensor,
        sample: torch.Tensor,
        codebook: torch.Tensor,
    ) -> None:
        del relative_NC, room_NC
        chunk = rows.start // self.rows
        part = slice(self.bounds[chunk], self.bounds[chunk + 1])
        pull_P = sample * self.sample_P[part] + codebook * self.codebook_P[part]
        place = (self.vector_P[part], self.code_P[part] - rows.start)
        grad_NC[place] += pull_P.to(grad_NC.dtype)


def listed_entropies(
    chunks: Chunks, *, candidates: Candidates, best_N: torch.Tensor, settings: EntropySettings
) -> tuple[EntropyTerms, ListedGradient]:
    """From the candidates alone, in fp64."""
    vector_P, code_P = candidates.close_to(best_N)
    vectors, entries = chunks.z_ND.shape[0], chunks.codebook_KD.shape[0]
    logit_P = _exact_logits(chunks, vector_P=vector_P, code_P=code_P)

    def per_vector(value_P: torch.Tensor) -> torch.Tensor:
        return value_P.new_zeros(vectors).index_add_(0, vector_P, value_P)

    highest_N = logit_P.new_full((vectors,), -torch.inf)
    highest_N.scatter_reduce_(0, vector_P, logit_P, reduce="amax")
    sharp_P = (logit_P - highest_N[vector_P]) / settings.temperature
    log_q_P = sharp_P - per_vector(sharp_P.exp()).log()[vector_P]
    q_P = log_q_P.exp()
    entropy_N = -per_vector(q_P * log_q_P)
    mean_K = q_P.new_zeros(entries).index_add_(0, code_P, q_P / vectors)
    mean_K = mean_over_ranks(mean_K, group=settings.group)
    codebook, slope_K = entropy_and_slope(mean_K, settings=settings)
    slope_P = slope_K[code_P]
    scale_P = q_P / (vectors * settings.temperature)
    dtype = chunks.z_ND.dtype
    counts = torch.bincount(code_P // chunks.rows, minlength=-(-entries // chunks.rows))
    return (
        EntropyTerms(sample=entropy_N.mean().to(dtype), codebook=codebook.to(dtype)),
        ListedGradient(
            vector_P=vector_P,
            code_P=code_P,
            sample_P=-scale_P * (log_q_P + entropy_N[vector_P]),
            codebook_P=scale_P * (slope_P - per_vector(q_P * slope_P)[vector_P]),
            bounds=[0, *counts.cumsum(0).tolist()],
            rows=chunks.rows,
        ),
    )


def _exact_logits(chunks: Chunks, *, vector_P: torch.Tensor, code_P: torch.Tensor) -> torch.Tensor:
    logit_P = torch.empty(len(vector_P), dtype=torch.float64, device=vector_P.device)
    for vector_Q, code_Q, logit_Q in zip(
        vector_P.split(CANDIDATES_AT_ONCE),
        code_P.split(CANDIDATES_AT_ONCE),
        logit_P.split(CANDIDATES_AT_ONCE),
        strict=True,
    ):
        z_QD, row_QD = chunks.z_ND[vector_Q].double(), chunks.codebook_KD[code_Q].double()
        logit_Q.copy_(torch.linalg.vecdot(z_QD, row_QD))
    return logit_P


# -------------------------------------------------------------------------- dense


@dataclass(kw_only=True, slots=True)
class DenseGradient:
    """q again for every chunk; ``log_total_N`` is its normaliser, ``entropy_N`` is H(q_n),
    ``slope_K`` c = dH/da and ``mean_slope_N`` <q_n, c>."""

    temperature: float
    log_total_N: torch.Tensor
    entropy_N: torch.Tensor
    slope_K: torch.Tensor
    mean_slope_N: torch.Tensor

    def add(
        self,
        grad_NC: torch.Tensor,
        *,
        rows: slice,
        relative_NC: torch.Tensor,
        room_NC: torch.Tensor,
        sample: torch.Tensor,
        codebook: torch.Tensor,
    ) -> None:
        bits_NC = _log2_q(relative_NC, temperature=self.temperature, log_total_N=self.log_total_N)
        torch.exp2(bits_NC, out=room_NC)
        scale = 1 / (grad_NC.shape[0] * self.temperature)
        to_sample, to_codebook = sample * scale, codebook * scale
        offset_N = to_sample * self.entropy_N + to_codebook * self.mean_slope_N
        pull_NC = bits_NC.mul_(-to_sample / BITS).sub_(offset_N[:, None])
        pull_NC.add_(to_codebook * self.slope_K[rows])
        grad_NC.addcmul_(room_NC, pull_NC)


def dense_entropies(
    chunks: Chunks, *, best_N: torch.Tensor, log_total_N: torch.Tensor, settings: EntropySettings
) -> tuple[EntropyTerms, DenseGradient]:
    """In a walk of its own, given the best logits and, relative to them, the logarithms of the
    sums of exponentials at the temperature."""
    entropy_N, mean_slope_N = torch.zeros_like(best_N), torch.zeros_like(best_N)
    slope_K = torch.empty_like(chunks.codebook_KD[:, 0])
    codebook = torch.zeros_like(best_N[0])
    for rows, _, (relative_NC, q_NC) in chunks:
        chunks.relative_logits(rows, best_N=best_N, out=relative_NC)
        bits_NC = _log2_q(relative_NC, temperature=settings.temperature, log_total_N=log_total_N)
        torch.exp2(bits_NC, out=q_NC)
        entropy_N -= torch.linalg.vecdot(q_NC, bits_NC) / BITS
        mean_C = mean_over_ranks(q_NC.mean(dim=0), group=settings.group)
        part, slope_K[rows] = entropy_and_slope(mean_C, settings=settings)
        codebook += part
        mean_slope_N.addmv_(q_NC, slope_K[rows])
    return (
        EntropyTerms(sample=entropy_N.mean(), codebook=codebook),
        DenseGradient(
            temperature=settings.temperature,
            log_total_N=log_total_N,
            entropy_N=entropy_N,
            slope_K=slope_K,
            mean_slope_N=mean_slope_N,
        ),
    )


def _log2_q(
    relative_NC: torch.Tensor, *, temperature: float, log_total_N: torch.Tensor
) -> torch.Tensor:
    """log q in bits, in the place of the logits less the largest."""
    relative_NC.mul_(BITS / temperature).sub_((log_total_N * BITS)[:, None])
    return relative_NC.clamp_min_(exponent_floor(relative_NC.dtype))
