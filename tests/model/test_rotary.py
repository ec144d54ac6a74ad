import torch

from emu35.model.context import AttentionContext
from emu35.model.mask import AttentionMask
from emu35.model.rotary import rotary_tables, rotate

HEAD, THETA = 16, 1e4


def tables(positions_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = AttentionMask.causal(torch.zeros_like(positions_BS))
    context = AttentionContext(positions_BS=positions_BS, mask=mask)
    return rotary_tables(context, head_dim=HEAD, theta=THETA, dtype=torch.float32)


def as_complex(states: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """The definition: coordinate pair (i, i + D/2) is one complex number, turned by its angle."""
    half = HEAD // 2
    numbers = torch.complex(states[..., :half].double(), states[..., half:].double())
    exponent = -torch.arange(half, dtype=torch.float64) / half
    angles = positions_BS.t()[:, :, None, None].double() * THETA**exponent
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def test_value_and_gradient_equal_complex_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    positions_BS = torch.tensor([[0, 1, 2, 0, 1], [7, 7, 8, 900, 3]])
    states = torch.randn(5, 2, 3, HEAD, generator=generator, requires_grad=True)
    upstream = torch.randn(5, 2, 3, HEAD, generator=generator)
    cos_SB1D, sin_SB1D = tables(positions_BS)

    ours = rotate(states, cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D)
    oracle = as_complex(states, positions_BS)

    torch.testing.assert_close(ours.double(), oracle, rtol=0, atol=1e-4)
    (ours_grad,) = torch.autograd.grad(ours, states, upstream)
    (oracle_grad,) = torch.autograd.grad(oracle, states, upstream.double())
    torch.testing.assert_close(ours_grad, oracle_grad, rtol=0, atol=1e-4)


def test_scores_depend_on_the_difference_of_positions_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, HEAD, generator=generator)
    scores = []
    for shift in (0, 5, 400):
        turned = []
        for states, position in ((query, 9 + shift), (key, 2 + shift)):
            cos_SB1D, sin_SB1D = tables(torch.tensor([[position]]))
            turned.append(rotate(states, cos_SB1D=cos_SB1D, sin_SB1D=sin_SB1D))
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].repeat(3), rtol=1e-4, atol=1e-4)
