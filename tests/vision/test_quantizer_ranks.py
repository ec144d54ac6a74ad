"""The quantizer and its entropies on two real ranks: the same as one with the whole batch."""

from pathlib import Path

import pytest
import torch
from torchrun_ranks import run_ranks

from emu35.vision.ibq.entropy import EntropySettings
from emu35.vision.ibq.propagation import quantize, quantize_plain

WORKER = Path(__file__).with_name("quantizer_worker.py")

pytestmark = pytest.mark.multiproc

CASES = {
    "listed": {"share": 1.0},
    "dense": {"share": 0.0},
    "uneven": {"share": 0.0, "sizes": (4, 20)},
    # Only the first rank's entropies could come from a list.
    "unlike": {"share": 0.3, "lengths": (5.0, 0.01)},
}


def drawn(
    *,
    share: float,
    sizes: tuple[int, int] = (12, 12),
    lengths: tuple[float, float] = (1.0, 1.0),
) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "parts": [length * normal(size, 6) for size, length in zip(sizes, lengths, strict=True)],
        "codebook_KD": 0.3 * normal(50, 6),
        "gradients": [normal(size, 6) for size in sizes],
        "share": share,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("quantizer")
    torch.save({name: drawn(**case) for name, case in CASES.items()}, folder / "inputs.pt")
    run_ranks(
        [str(WORKER), str(folder / "inputs.pt"), str(folder / "result.pt")], ranks=2, timeout=200
    )
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("form", ["chunked", "plain"])
@pytest.mark.parametrize("name", ["listed", "dense", "unlike"])
def test_two_ranks_equal_one(found: dict, name: str, form: str) -> None:
    """Loss, both entropies, and the gradients once averaged over the ranks."""
    case = drawn(**CASES[name])
    z_ND = torch.cat(case["parts"]).requires_grad_()
    codebook_KD = case["codebook_KD"].requires_grad_()
    alone = quantize_plain(z_ND, codebook_KD=codebook_KD, entropy=EntropySettings(temperature=0.1))
    assert alone.entropy is not None
    loss = alone.entropy.loss(sample_weight=0.7, codebook_weight=1.3)
    loss = loss + (alone.z_q_ND * torch.cat(case["gradients"])).sum(1).mean()
    loss.backward()
    numbers = torch.stack([loss, alone.entropy.sample, alone.entropy.codebook])
    ours = found[name, form]
    torch.testing.assert_close(ours["numbers"], numbers.detach())
    torch.testing.assert_close(ours["grad_z"], z_ND.grad)
    torch.testing.assert_close(ours["grad_codebook"], codebook_KD.grad)


def test_the_distribution_that_counts_is_that_of_all_ranks(found: dict) -> None:
    """A rank alone would find less spread: this is what the global average is for."""
    case = drawn(**CASES["dense"])
    alone = [
        quantize(z_ND, codebook_KD=case["codebook_KD"], entropy=EntropySettings(temperature=0.1))
        for z_ND in case["parts"]
    ]
    together = found["dense", "chunked"]["numbers"][2].item()
    assert all(one.entropy.codebook.item() < together - 0.05 for one in alone if one.entropy)


def test_ranks_may_hold_different_numbers_of_vectors(found: dict) -> None:
    """They cut the codebook alike all the same, and each rank's mean counts alike."""
    for name, ours in found["uneven", "chunked"].items():
        torch.testing.assert_close(ours, found["uneven", "plain"][name])
