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

The entropy term (see :mod:`~emu35.vision.ibq.entropy`) shares both passes. With q = softmax(L /
temperature), a its mean, c = dH/da, and s and b the gradients of the two entropies::

    dL += q / (N * temperature) * (b * (c - q . c) - s * (log q + H(q)))

The first pass notes the few codes of every vector that have any of its q, and a list of them is
enough (:mod:`~emu35.vision.ibq.sharp`). Where q is spread too wide, the first pass has its sum of
exponentials and a second one finds a and q . c: row k of a needs all vectors but no other row, so c
is known chunk by chunk.

The logits of a chunk are needed twice or more, and a product costs as much as all else that is done
with them. Up to ``chunks.KEPT_ELEMENTS`` are therefore kept from the first time on; the rest is
computed anew. Small codebooks are kept whole, and memory does not grow with large ones.

Everything is taken relative to the largest logit, since differences survive division by a small
temperature where the logits themselves would lose their last digits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from emu35.vision.ibq.chunks import BITS, Chunks
from emu35.vision.ibq.entropy import (
    EntropySettings,
    EntropyTerms,
    entropy_plain,
    most_over_ranks,
)
from emu35.vision.ibq.nearest import Nearest, chunk_rows
from emu35.vision.ibq.sharp import (
    Candidates,
    EntropyGradient,
    dense_entropies,
    listed_entropies,
)


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
        chunks = Chunks(z_ND, codebook_KD=codebook_KD, rows=rows, buffers=2)
        if settings is not None or any(ctx.needs_input_grad):  # type: ignore[attr-defined]
            chunks.keep()
        sample, codebook, sharp = None, None, None
        candidates = Candidates(chunks, temperature=settings.temperature) if settings else None
        with full_precision(z_ND.device):
            codes_N, soft = _soft_pass(chunks, candidates=candidates)
            if settings is not None:
                assert candidates is not None
                terms, sharp = _entropies(
                    chunks, candidates=candidates, soft=soft, settings=settings
                )
                sample, codebook = terms.sample, terms.codebook
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
        sharp: EntropyGradient | None = ctx.sharp  # type: ignore[attr-defined]
        chunks = Chunks(z_ND, codebook_KD=codebook_KD, rows=ctx.rows, buffers=3)  # type: ignore[attr-defined]
        chunks.kept = kept
        mean_N1 = (grad_ND * soft.expected_ND).sum(dim=1, keepdim=True)
        grad_z_ND = torch.zeros_like(z_ND)
        grad_rows_KD = torch.empty_like(codebook_KD)
        with full_precision(z_ND.device):
            for rows, part_CD, (relative_NC, soft_NC, grad_NC) in chunks:
                chunks.relative_logits(rows, best_N=soft.best_N, out=relative_NC)
                torch.sub(relative_NC, soft.log_total_N[:, None], out=soft_NC)
                soft_NC.mul_(BITS).clamp_min_(chunks.floor).exp2_()
                torch.mm(grad_ND, part_CD.T, out=grad_NC).sub_(mean_N1).mul_(soft_NC)
                if sharp is not None:
                    assert grad_sample is not None
                    assert grad_codebook is not None
                    sharp.add(
                        grad_NC,
                        rows=rows,
                        relative_NC=relative_NC,
                        room_NC=soft_NC,
                        sample=grad_sample,
                        codebook=grad_codebook,
                    )
                grad_z_ND.addmm_(grad_NC, part_CD)
                torch.mm(grad_NC.T, z_ND, out=grad_rows_KD[rows])
        grad_rows_KD.index_add_(0, codes_N, grad_ND)
        return grad_z_ND, grad_rows_KD, None, None


@dataclass(kw_only=True, slots=True)
class _Soft:
    """The first pass's finds. Logarithms of sums of exponentials are relative to the largest logit
    ``best_N``; ``sharp_log_total_N`` is the one at the temperature of the entropies."""

    best_N: torch.Tensor
    log_total_N: torch.Tensor
    expected_ND: torch.Tensor
    sharp_log_total_N: torch.Tensor | None


def _soft_pass(chunks: Chunks, *, candidates: Candidates | None) -> tuple[torch.Tensor, _Soft]:
    """Codes and normalisers: one walk, everything relative to the largest logit so far."""
    z_ND = chunks.z_ND
    nearest = Nearest(z_ND)
    total_N, sharp_total_N = torch.zeros_like(z_ND[:, 0]), torch.zeros_like(z_ND[:, 0])
    expected_ND = torch.zeros_like(z_ND)
    for rows, part_CD, (relative_NC, weight_NC) in chunks:
        previous_N = nearest.best_N.clone()
        logits_NC = chunks.logits(rows, out=relative_NC)
        chunk_best_N = nearest.update(logits_NC, start=rows.start)
        if candidates is not None:
            candidates.update(
                logits_NC, start=rows.start, chunk_best_N=chunk_best_N, best_N=nearest.best_N
            )
        torch.sub(logits_NC, nearest.best_N[:, None], out=relative_NC)
        shift_N = previous_N - nearest.best_N
        torch.mul(relative_NC, BITS, out=weight_NC).clamp_min_(chunks.floor).exp2_()
        shrink_N = shift_N.exp()
        total_N.mul_(shrink_N).add_(weight_NC.sum(dim=1))
        expected_ND.mul_(shrink_N[:, None]).addmm_(weight_NC, part_CD)
        if candidates is not None:
            relative_NC.mul_(BITS / candidates.temperature).clamp_min_(chunks.floor).exp2_()
            sharp_total_N.mul_((shift_N / candidates.temperature).exp_())
            sharp_total_N.add_(relative_NC.sum(dim=1))
    return nearest.codes_N, _Soft(
        best_N=nearest.best_N,
        log_total_N=total_N.log(),
        expected_ND=expected_ND.div_(total_N[:, None]),
        sharp_log_total_N=sharp_total_N.log_() if candidates is not None else None,
    )


def _entropies(
    chunks: Chunks, *, candidates: Candidates, soft: _Soft, settings: EntropySettings
) -> tuple[EntropyTerms, EntropyGradient]:
    """From the list where every rank has one, else in a second pass."""
    assert soft.sharp_log_total_N is not None
    too_many = int(candidates.too_many)
    if most_over_ranks(too_many, like=soft.best_N, group=settings.group):
        return dense_entropies(
            chunks,
            best_N=soft.best_N,
            log_total_N=soft.sharp_log_total_N,
            settings=settings,
        )
    return listed_entropies(chunks, candidates=candidates, best_N=soft.best_N, settings=settings)
