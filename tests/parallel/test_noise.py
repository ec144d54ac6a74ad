"""Noise that depends on seed, position and number alone follows its distribution along each."""

import torch

from emu35.parallel.noise import gumbel, seed_for, uniform


def test_noise_is_standard_gumbel_whatever_varies() -> None:
    one, many = torch.zeros(1, dtype=torch.int64), torch.arange(100_000)
    by_id = gumbel(one, positions_N=one, ids_NM=many[None])[0]
    by_seed = gumbel(many, positions_N=torch.zeros_like(many), ids_NM=one.expand(100_000, 1))[:, 0]
    by_position = gumbel(torch.zeros_like(many), positions_N=many, ids_NM=one.expand(100_000, 1))[
        :, 0
    ]
    for noise in (by_id, by_seed, by_position):
        # Euler's constant and pi^2 / 6; four standard errors of 100,000 draws.
        assert abs(noise.mean() - 0.5772) < 0.0163
        assert abs(noise.var() - 1.6449) < 0.06
        assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 0.013


def test_uniform_noise_fills_its_interval() -> None:
    many = torch.arange(100_000)
    noise = uniform(torch.zeros(1, dtype=torch.int64), positions_N=many[:1], ids_NM=many[None])[0]
    assert noise.min() > 0
    assert noise.max() < 1
    # The largest gap between the empirical and the true distribution; 1.95 / sqrt(n) is its 0.1 %
    # quantile (Kolmogorov and Smirnov).
    ranks = torch.arange(1, len(many) + 1, dtype=torch.float64) / len(many)
    assert (noise.sort().values - ranks).abs().max() < 1.95 / len(many) ** 0.5


def test_purposes_draw_apart() -> None:
    """The same positions and numbers under two purposes of one seed: no correlation."""
    many = torch.arange(20_000)
    one, other = (
        uniform(
            torch.tensor([seed_for(purpose, seed=1234)]), positions_N=many[:1], ids_NM=many[None]
        )[0]
        for purpose in ("times", "prompts")
    )
    assert seed_for("times", seed=1234) == seed_for("times", seed=1234)
    assert seed_for("times", seed=1235) != seed_for("times", seed=1234)
    # Four standard errors of a correlation over 20,000 draws.
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.03
