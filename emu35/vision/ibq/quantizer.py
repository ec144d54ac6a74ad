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
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 23
"""Logits held at once (N x chunk): 32 MiB in fp32, and a few buffers of that size."""

MIN_CHUNK = 256


@dataclass(kw_only=True, slots=True)
class Quantized:
    """What quantization yields, all grids of ``[B, D, H, W]`` except the codes.

    ``z`` is the encoder's output, ``z_q`` has a codebook row's value and the propagated gradient,
    ``hard`` has the same value and sends its gradient to the chosen rows alone.
    """

    z_BDHW: torch.Tensor
    z_q_BDHW: torch.Tensor
    hard_BDHW: torch.Tensor
    codes_BHW: torch.Tensor


class Quantizer(nn.Module):
    """The codebook ``[K, D]``; always computes in the codebook's precision, never autocast."""

    def __init__(self, num_codes: int, *, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)

    @property
    def codebook_KD(self) -> torch.Tensor:
        return self.embedding.weight

    def forward(self, z_BDHW: torch.Tensor) -> Quantized:
        batch, dim, height, width = z_BDHW.shape
        with torch.autocast(z_BDHW.device.type, enabled=False):
            z_BDHW = z_BDHW.to(self.codebook_KD.dtype)
            z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, dim)
            z_q_ND, codes_N = quantize(z_ND, codebook_KD=self.codebook_KD)
            hard_ND = functional.embedding(codes_N, self.codebook_KD)
        grid = (batch, height, width)
        return Quantized(
            z_BDHW=z_BDHW,
            z_q_BDHW=z_q_ND.unflatten(0, grid).permute(0, 3, 1, 2),
            hard_BDHW=hard_ND.unflatten(0, grid).permute(0, 3, 1, 2),
            codes_BHW=codes_N.unflatten(0, grid),
        )


def quantize(
    z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_q ``[N, D]`` and codes ``[N]``, chunked over the codebook; same dtype for both inputs."""
    rows = chunk or chunk_rows(z_ND.shape[0])
    return _IndexPropagation.apply(z_ND, codebook_KD, rows)  # type: ignore[return-value]


def quantize_plain(
    z_ND: torch.Tensor, *, codebook_KD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with N x K matrices: the oracle of :func:`quantize`."""
    logits_NK = z_ND @ codebook_KD.T
    soft_NK = logits_NK.softmax(dim=1)
    codes_N = logits_NK.argmax(dim=1)
    hard_NK = functional.one_hot(codes_N, codebook_KD.shape[0]).to(soft_NK.dtype)
    return (hard_NK + soft_NK - soft_NK.detach()) @ codebook_KD, codes_N


@torch.no_grad()
def nearest_codes(
    z_ND: torch.Tensor, *, codebook_KD: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Codes ``[N]`` by the largest dot product in fp32, one running maximum over chunks.

    Half-precision logits would flip a few percent of the codes at 131,072 entries.
    """
    z_ND, rows = z_ND.float(), chunk or chunk_rows(z_ND.shape[0])
    best_N = torch.full((z_ND.shape[0],), -torch.inf, device=z_ND.device)
    codes_N = torch.zeros(z_ND.shape[0], dtype=torch.int64, device=z_ND.device)
    for start in range(0, codebook_KD.shape[0], rows):
        logits_NC = z_ND @ codebook_KD[start : start + rows].float().T
        _keep_larger(logits_NC, start=start, best_N=best_N, codes_N=codes_N)
    return codes_N


def chunk_rows(num_vectors: int) -> int:
    """Codebook rows a chunk, such that the logits of ``num_vectors`` stay within bounds."""
    return max(MIN_CHUNK, CHUNK_ELEMENTS // max(1, num_vectors))


def _keep_larger(
    logits_NC: torch.Tensor, *, start: int, best_N: torch.Tensor, codes_N: torch.Tensor
) -> None:
    """Fold one chunk into the running maximum, in place; an equal later logit does not win."""
    chunk_best_N, chunk_code_N = logits_NC.max(dim=1)
    larger_N = chunk_best_N > best_N
    torch.where(larger_N, chunk_code_N + start, codes_N, out=codes_N)
    torch.maximum(best_N, chunk_best_N, out=best_N)


class _IndexPropagation(torch.autograd.Function):
    """See the module docstring for the formulas."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        z_ND: torch.Tensor,
        codebook_KD: torch.Tensor,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best_N = torch.full_like(z_ND[:, 0], -torch.inf)
        total_N = torch.zeros_like(best_N)
        expected_ND = torch.zeros_like(z_ND)
        codes_N = torch.zeros(z_ND.shape[0], dtype=torch.int64, device=z_ND.device)
        for start in range(0, codebook_KD.shape[0], rows):
            part_CD = codebook_KD[start : start + rows]
            logits_NC = z_ND @ part_CD.T
            previous_N = best_N.clone()
            _keep_larger(logits_NC, start=start, best_N=best_N, codes_N=codes_N)
            shrink_N = torch.exp(previous_N - best_N)
            weight_NC = logits_NC.sub_(best_N[:, None]).exp_()
            total_N.mul_(shrink_N).add_(weight_NC.sum(dim=1))
            expected_ND.mul_(shrink_N[:, None]).addmm_(weight_NC, part_CD)
        expected_ND.div_(total_N[:, None])
        log_total_N = best_N + total_N.log()
        ctx.save_for_backward(z_ND, codebook_KD, log_total_N, expected_ND, codes_N)
        ctx.rows = rows  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(codes_N)
        return codebook_KD[codes_N], codes_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        grad_ND: torch.Tensor,
        _grad_codes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        z_ND, codebook_KD, log_total_N, expected_ND, codes_N = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: int = ctx.rows  # type: ignore[attr-defined]
        mean_N1 = (grad_ND * expected_ND).sum(dim=1, keepdim=True)
        grad_z_ND = torch.zeros_like(z_ND)
        grad_codebook_KD = torch.empty_like(codebook_KD)
        for start in range(0, codebook_KD.shape[0], rows):
            part_CD = codebook_KD[start : start + rows]
            soft_NC = (z_ND @ part_CD.T).sub_(log_total_N[:, None]).exp_()
            grad_logits_NC = (grad_ND @ part_CD.T).sub_(mean_N1).mul_(soft_NC)
            grad_z_ND.addmm_(grad_logits_NC, part_CD)
            torch.mm(grad_logits_NC.T, z_ND, out=grad_codebook_KD[start : start + rows])
        grad_codebook_KD.index_add_(0, codes_N, grad_ND)
        return grad_z_ND, grad_codebook_KD, None
