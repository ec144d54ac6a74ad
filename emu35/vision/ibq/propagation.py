"""Index propagation: hard codes going forward, a gradient for the whole codebook going back.

For latent vectors z and codebook E the logits are the dot products L = z E^T, the code is the
largest logit (ties: the lowest index), and with p = softmax(L) and the one-hot ``hard``::

    z_q = (hard + p - stop_gradient(p)) E

so z_q equals a codebook row in value, while its gradient passes through p to z and to every row
(arXiv 2412.02692, section 3.2). :func:`quantize_plain` is that formula as written: it holds several
matrices of N x K and serves as the oracle of the tests. :func:`quantize` computes the same from
chunks of the codebook. With G the gradient that arrives at z_q::

    dL = p * (G E^T - <G, p E>)      dz = dL E      dE = dL^T z + scatter(codes, G)

the first of which is the backward pass of attention with keys and values E. So the forward pass
keeps a running maximum, sum of exponentials and p E, as flash attention does, and the backward
pass recomputes the logits of each chunk. The value path of E carries ``hard`` only, since
p - stop_gradient(p) is zero: that is why dE has no p^T G.

The entropy term (see :mod:`~emu35.vision.ibq.entropy`) shares both passes. The first one also sums
the exponentials at the temperature; a second one, with q = softmax(L / temperature) known, finds
the mean distribution a and c = dH/da. Row k of a needs all vectors but no other row, so c is known
chunk by chunk and q . c is summed on the way. With s and b the gradients of the two entropies::

    dL += q / (N * temperature) * (b * (c - q . c) - s * (log q + H(q)))

The logits of a chunk are needed three times, and a product costs as much as all else that is done
with them. Up to ``KEPT_ELEMENTS`` are therefore kept from the first time on, chunk by chunk; the
rest is computed anew. Small codebooks are kept whole, and memory does not grow with large ones.

Everything is taken relative to the largest logit, since differences survive division by a small
temperature where the logits themselves would lose their last digits.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from emu35.vision.ibq.entropy import (
    EntropySettings,
    EntropyTerms,
    entropy_and_slope,
    entropy_plain,
    mean_over_ranks,
    most_over_ranks,
)
from emu35.vision.ibq.nearest import Nearest, chunk_rows

BITS = math.log2(math.e)
"""Bits a nat. On a CPU exp2 takes a third of the time of exp, and less than a tenth where the
result underflows, which at a temperature of 0.01 it does nearly everywhere."""

KEPT_ELEMENTS = 3 << 25
"""Logits kept between the passes: 384 MiB in fp32, three quarters of those of 1,024 vectors and
131,072 rows."""


@dataclass(kw_only=True, slots=True)
class Propagated:
    """``z_q_ND`` has the codebook row's value and the propagated gradient; ``codes_N`` is int64."""

    z_q_ND: torch.Tensor
    codes_N: torch.Tensor
    entropy: EntropyTerms | None


def quantize(
    z_ND: torch.Tensor,
    *,
    codebook_KD: torch.Tensor,
    entropy: EntropySettings | None = None,
    chunk: int | None = None,
) -> Propagated:
    """Index propagation, chunked over the codebook; with its entropies if ``entropy`` is given.

    Args:
        z_ND: latent vectors ``[N, D]``, fp32 or fp64; results are of the same dtype.
        codebook_KD: rows ``[K, D]``, of the same dtype.
        entropy: every rank of its group must call with the same codebook, and with the same
            ``chunk`` if any; N may differ.
        chunk: codebook rows at once; by default as many as suit the device.
    """
    assert z_ND.dtype == codebook_KD.dtype, (z_ND.dtype, codebook_KD.dtype)
    rows = chunk
    if rows is None:
        # Ranks reduce chunk by chunk, so they must cut alike.
        group = entropy.group if entropy else None
        rows = chunk_rows(z_ND, vectors=most_over_ranks(z_ND.shape[0], like=z_ND, group=group))
    z_q_ND, codes_N, sample, codebook = _Propagation.apply(z_ND, codebook_KD, rows, entropy)  # type: ignore[misc]
    terms = EntropyTerms(sample=sample, codebook=codebook) if entropy else None
    return Propagated(z_q_ND=z_q_ND, codes_N=codes_N, entropy=terms)


def quantize_plain(
    z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, entropy: EntropySettings | None = None
) -> Propagated:
    """The definition, with N x K matrices: the oracle of :func:`quantize`."""
    logits_NK = z_ND @ codebook_KD.T
    soft_NK = logits_NK.softmax(dim=1)
    codes_N = logits_NK.argmax(dim=1)
    hard_NK = functional.one_hot(codes_N, codebook_KD.shape[0]).to(soft_NK.dtype)
    return Propagated(
        z_q_ND=(hard_NK + soft_NK - soft_NK.detach()) @ codebook_KD,
        codes_N=codes_N,
        entropy=entropy_plain(logits_NK, settings=entropy) if entropy else None,
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products as precise as their inputs: no autocast, no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def exponent_floor(dtype: torch.dtype) -> float:
    """The least exponent of 2 worth taking, for fp32 that of 5e-31: a fifth of the range is left,
    so that products with what is found are no denormal numbers, which are slow."""
    return 0.8 * math.log2(torch.finfo(dtype).tiny)


class _Propagation(torch.autograd.Function):
    """See the module docstring for the formulas."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        z_ND: torch.Tensor,
        codebook_KD: torch.Tensor,
        rows: int,
        settings: EntropySettings | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        chunks = _Chunks(z_ND, codebook_KD=codebook_KD, rows=rows, buffers=2)
        if settings is not None or any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            chunks.keep()
        sample, codebook, sharp = None, None, None
        with full_precision(z_ND.device):
            codes_N, soft = _soft_pass(chunks, settings=settings)
            if settings is not None:
                sample, codebook, sharp = _entropy_pass(chunks, soft=soft, settings=settings)
        ctx.save_for_backward(z_ND, codebook_KD, codes_N, *chunks.kept)
        ctx.rows, ctx.soft, ctx.sharp = rows, soft, sharp  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(codes_N)
        return codebook_KD[codes_N], codes_N, sample, codebook

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        grad_ND: torch.Tensor,
        _grad_codes: torch.Tensor | None,
        grad_sample: torch.Tensor | None,
        grad_codebook: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        z_ND, codebook_KD, codes_N, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        soft: _Soft = ctx.soft  # type: ignore[attr-defined]
        sharp: _Sharp | None = ctx.sharp  # type: ignore[attr-defined]
        chunks = _Chunks(z_ND, codebook_KD=codebook_KD, rows=ctx.rows, buffers=3)  # type: ignore[attr-defined]
        chunks.kept = kept
        mean_N1 = (grad_ND * soft.expected_ND).sum(dim=1, keepdim=True)
        grad_z_ND = torch.zeros_like(z_ND)
        grad_rows_KD = torch.empty_like(codebook_KD)
        with full_precision(z_ND.device):
            for rows, part_CD, (logits_NC, soft_NC, grad_NC) in chunks:
                chunks.relative_logits(rows, best_N=soft.best_N, out=logits_NC)
                torch.sub(logits_NC, soft.log_total_N[:, None], out=soft_NC)
                soft_NC.mul_(BITS).clamp_min_(chunks.floor).exp2_()
                torch.mm(grad_ND, part_CD.T, out=grad_NC).sub_(mean_N1).mul_(soft_NC)
                if sharp is not None:
                    assert grad_sample is not None
                    assert grad_codebook is not None
                    sharp.add_gradient(
                        grad_NC,
                        rows=rows,
                        logits_NC=logits_NC,
                        room_NC=soft_NC,
                        sample=grad_sample,
                        codebook=grad_codebook,
                    )
                grad_z_ND.addmm_(grad_NC, part_CD)
                torch.mm(grad_NC.T, z_ND, out=grad_rows_KD[rows])
        grad_rows_KD.index_add_(0, codes_N, grad_ND)
        return grad_z_ND, grad_rows_KD, None, None


class _Chunks:
    """Walks the codebook: yields rows as a slice, the rows themselves ``[C, D]``, and ``buffers``
    matrices ``[N, C]`` to write into, the same memory for every chunk.

    ``kept`` are the logits of the first chunks, as far as they are kept.
    """

    def __init__(
        self, z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, rows: int, buffers: int
    ) -> None:
        self.z_ND, self.codebook_KD = z_ND, codebook_KD
        self.rows = min(rows, codebook_KD.shape[0])
        self.floor = exponent_floor(z_ND.dtype)
        self.kept: list[torch.Tensor] = []
        self._buffers = z_ND.new_empty(buffers, z_ND.shape[0] * self.rows)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        vectors, entries = self.z_ND.shape[0], self.codebook_KD.shape[0]
        for start in range(0, entries, self.rows):
            part_CD = self.codebook_KD[start : start + self.rows]
            width = part_CD.shape[0]
            # Contiguous also where the last chunk is narrower.
            matrices = [flat[: vectors * width].view(vectors, width) for flat in self._buffers]
            yield slice(start, start + width), part_CD, matrices

    def keep(self) -> None:
        """Make room for logits to keep."""
        vectors, entries = self.z_ND.shape[0], self.codebook_KD.shape[0]
        fitting = KEPT_ELEMENTS // (vectors * self.rows)
        for start in range(0, entries, self.rows)[:fitting]:
            width = min(self.rows, entries - start)
            self.kept.append(self.z_ND.new_empty(vectors, width))

    def logits(self, rows: slice, *, out: torch.Tensor) -> torch.Tensor:
        """The logits of a chunk ``[N, C]``, where they are kept or else in ``out``."""
        room_NC = self._kept(rows)
        room_NC = out if room_NC is None else room_NC
        return torch.mm(self.z_ND, self.codebook_KD[rows].T, out=room_NC)

    def relative_logits(
        self, rows: slice, *, best_N: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Logits less the largest one, in ``out``, once :meth:`logits` has been called."""
        kept_NC = self._kept(rows)
        if kept_NC is None:
            return torch.mm(self.z_ND, self.codebook_KD[rows].T, out=out).sub_(best_N[:, None])
        return torch.sub(kept_NC, best_N[:, None], out=out)

    def _kept(self, rows: slice) -> torch.Tensor | None:
        index = rows.start // self.rows
        return self.kept[index] if index < len(self.kept) else None


@dataclass(kw_only=True, slots=True)
class _Soft:
    """The first pass's finds. Logarithms of sums of exponentials are relative to the largest logit
    ``best_N``; ``sharp_log_total_N`` is the one at the temperature of the entropies."""

    best_N: torch.Tensor
    log_total_N: torch.Tensor
    expected_ND: torch.Tensor
    sharp_log_total_N: torch.Tensor | None


def _soft_pass(chunks: _Chunks, *, settings: EntropySettings | None) -> tuple[torch.Tensor, _Soft]:
    """Codes and normalisers: one walk, everything relative to the largest logit so far."""
    z_ND = chunks.z_ND
    nearest = Nearest(z_ND)
    total_N, sharp_total_N = torch.zeros_like(z_ND[:, 0]), torch.zeros_like(z_ND[:, 0])
    expected_ND = torch.zeros_like(z_ND)
    for rows, part_CD, (relative_NC, weight_NC) in chunks:
        previous_N = nearest.best_N.clone()
        logits_NC = chunks.logits(rows, out=relative_NC)
        nearest.update(logits_NC, start=rows.start)
        torch.sub(logits_NC, nearest.best_N[:, None], out=relative_NC)
        shift_N = previous_N - nearest.best_N
        torch.mul(relative_NC, BITS, out=weight_NC).clamp_min_(chunks.floor).exp2_()
        shrink_N = shift_N.exp()
        total_N.mul_(shrink_N).add_(weight_NC.sum(dim=1))
        expected_ND.mul_(shrink_N[:, None]).addmm_(weight_NC, part_CD)
        if settings is not None:
            relative_NC.mul_(BITS / settings.temperature).clamp_min_(chunks.floor).exp2_()
            sharp_total_N.mul_((shift_N / settings.temperature).exp_())
            sharp_total_N.add_(relative_NC.sum(dim=1))
    return nearest.codes_N, _Soft(
        best_N=nearest.best_N,
        log_total_N=total_N.log(),
        expected_ND=expected_ND.div_(total_N[:, None]),
        sharp_log_total_N=sharp_total_N.log_() if settings is not None else None,
    )


@dataclass(kw_only=True, slots=True)
class _Sharp:
    """q = softmax(L / temperature): its normaliser, H(q_n), c = dH/da and <q_n, c>."""

    temperature: float
    log_total_N: torch.Tensor
    entropy_N: torch.Tensor
    slope_K: torch.Tensor
    mean_slope_N: torch.Tensor

    def add_gradient(
        self,
        grad_NC: torch.Tensor,
        *,
        rows: slice,
        logits_NC: torch.Tensor,
        room_NC: torch.Tensor,
        sample: torch.Tensor,
        codebook: torch.Tensor,
    ) -> None:
        """Add what the entropies send to the logits of ``rows``; ``sample`` and ``codebook`` are
        the gradients that arrive at them. ``logits_NC``, relative to the largest, and ``room_NC``
        are written over."""
        sharp_NC = _log2_q(logits_NC, temperature=self.temperature, log_total_N=self.log_total_N)
        torch.exp2(sharp_NC, out=room_NC)
        scale = 1 / (grad_NC.shape[0] * self.temperature)
        to_sample, to_codebook = sample * scale, codebook * scale
        offset_N = to_sample * self.entropy_N + to_codebook * self.mean_slope_N
        sharp_NC.mul_(-to_sample / BITS).sub_(offset_N[:, None]).add_(
            to_codebook * self.slope_K[rows]
        )
        grad_NC.addcmul_(room_NC, sharp_NC)


def _entropy_pass(
    chunks: _Chunks, *, soft: _Soft, settings: EntropySettings
) -> tuple[torch.Tensor, torch.Tensor, _Sharp]:
    """Both entropies and what their gradients need, in a second walk."""
    assert soft.sharp_log_total_N is not None
    entropy_N, mean_slope_N = torch.zeros_like(soft.best_N), torch.zeros_like(soft.best_N)
    slope_K = torch.empty_like(chunks.codebook_KD[:, 0])
    codebook = torch.zeros_like(soft.best_N[0])
    for rows, _, (logits_NC, q_NC) in chunks:
        chunks.relative_logits(rows, best_N=soft.best_N, out=logits_NC)
        bits_NC = _log2_q(
            logits_NC, temperature=settings.temperature, log_total_N=soft.sharp_log_total_N
        )
        torch.exp2(bits_NC, out=q_NC)
        entropy_N -= torch.linalg.vecdot(q_NC, bits_NC) / BITS
        mean_C = mean_over_ranks(q_NC.mean(dim=0), group=settings.group)
        part, slope_K[rows] = entropy_and_slope(mean_C, settings=settings)
        codebook += part
        mean_slope_N.addmv_(q_NC, slope_K[rows])
    return (
        entropy_N.mean(),
        codebook,
        _Sharp(
            temperature=settings.temperature,
            log_total_N=soft.sharp_log_total_N,
            entropy_N=entropy_N,
            slope_K=slope_K,
            mean_slope_N=mean_slope_N,
        ),
    )


def _log2_q(
    logits_NC: torch.Tensor, *, temperature: float, log_total_N: torch.Tensor
) -> torch.Tensor:
    """log q in bits, in the place of ``logits_NC``, which are relative to the largest."""
    logits_NC.mul_(BITS / temperature).sub_((log_total_N * BITS)[:, None])
    return logits_NC.clamp_min_(exponent_floor(logits_NC.dtype))
