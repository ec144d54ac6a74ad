"""Random numbers without a generator: pure functions of a seed, a position and a number.

Equal on every rank and device and in every batch, whatever was drawn before: a preempted request or
a resumed run has no state to lose, and the ranks that share a vocabulary can each draw for their
own part of it. The bits are the SplitMix64 sequence (Steele, Lea and Flood 2014, doi
10.1145/2660193.2660195), one per number, started at a mix of seed and position.

Suffixes: N draws, M numbers of a draw.
"""

import hashlib

import torch


def seed_for(purpose: str, *, seed: int) -> int:
    """A seed in [0, 2^62) for one ``purpose`` of a run's ``seed``: draws for different purposes
    have nothing in common, whatever their positions and numbers."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def uniform(
    seeds_N: torch.Tensor, *, positions_N: torch.Tensor, ids_NM: torch.Tensor
) -> torch.Tensor:
    """Uniform noise in (0, 1), fp64 [N, M]; neither end occurs. All arguments int64."""
    start_N = _mix(_mix(seeds_N + _GOLDEN) + positions_N * _GOLDEN)
    bits_NM = _mix(start_N[:, None] + (ids_NM + 1) * _GOLDEN)
    # 52 bits, in the middle of their cells: fp64 holds them exactly, never 0 and never 1.
    return (_shift(bits_NM, 12).double() + 0.5) * 2.0**-52


def gumbel(
    seeds_N: torch.Tensor, *, positions_N: torch.Tensor, ids_NM: torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise fp32 [N, M]: the id with the largest sum of log-probability and noise
    is a draw from the distribution."""
    uniform_NM = uniform(seeds_N, positions_N=positions_N, ids_NM=ids_NM)
    return uniform_NM.log_().neg_().log_().neg_().float()


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, whose products wrap as those of unsigned numbers do."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
