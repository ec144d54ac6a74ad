"""The chunked projection and loss against torch's, and what padding rows may not do."""

import pytest
import torch
import torch.nn.functional as F
from test_attention import tiny_model

from emu35.model.logits import vocabulary_logits, weighted_cross_entropy


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk: int) -> None:
    model = tiny_model(vocabulary_size=53)
    weight = model.output_weight
    generator = torch.Generator().manual_seed(0)
    hidden_SBH = torch.randn(9, 2, 32, generator=generator)
    labels_BS = torch.randint(0, 53, (2, 9), generator=generator)
    weights_BS = torch.rand(2, 9, generator=generator) * (torch.arange(9) != 4)

    ours_in = hidden_SBH.clone().requires_grad_()
    loss, losses_BS = weighted_cross_entropy(
        model, hidden_SBH=ours_in, labels_BS=labels_BS, weights_BS=weights_BS, chunk=chunk
    )
    ours = torch.autograd.grad(loss * 3.0, (ours_in, weight))

    plain_in = hidden_SBH.clone().requires_grad_()
    logits_BSV = plain_in.transpose(0, 1) @ weight.t()
    plain_BS = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none")
    plain = (plain_BS.view(2, 9) * weights_BS).sum()
    oracle = torch.autograd.grad(plain * 3.0, (plain_in, weight))

    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(losses_BS, plain_BS.view(2, 9).detach() * (weights_BS > 0))
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b)


def test_no_labels_give_a_zero_loss_with_zero_gradients() -> None:
    model = tiny_model(vocabulary_size=53)
    hidden_SBH = torch.randn(4, 1, 32, requires_grad=True)
    labels_BS = torch.zeros(1, 4, dtype=torch.int64)
    loss, _ = weighted_cross_entropy(
        model, hidden_SBH=hidden_SBH, labels_BS=labels_BS, weights_BS=torch.zeros(1, 4)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(gradient(hidden_SBH), torch.zeros_like(hidden_SBH))
    assert torch.equal(gradient(model.output_weight), torch.zeros(53, 32))


def test_rows_that_pad_the_vocabulary_are_neither_sampled_nor_in_the_softmax() -> None:
    model = tiny_model(vocabulary_size=60)
    model.vocabulary_size = 53  # as if 7 rows were padding
    with torch.no_grad():
        model.output_weight[53:] = 100.0
    hidden_SBH = torch.ones(3, 1, 32, requires_grad=True)
    assert vocabulary_logits(model, hidden_NH=hidden_SBH[:, 0]).shape == (3, 53)
    labels_BS = torch.tensor([[1, 2, 52]])
    loss, _ = weighted_cross_entropy(
        model, hidden_SBH=hidden_SBH, labels_BS=labels_BS, weights_BS=torch.ones(1, 3)
    )
    loss.backward()
    real = F.cross_entropy(
        hidden_SBH[:, 0] @ model.output_weight[:53].t(), labels_BS[0], reduction="sum"
    )
    torch.testing.assert_close(loss, real)
    assert torch.equal(gradient(model.output_weight)[53:], torch.zeros(7, 32))


def test_validation_under_no_grad_gives_the_same_loss() -> None:
    model = tiny_model(vocabulary_size=53)
    hidden_SBH = torch.randn(6, 1, 32)
    arguments = {
        "hidden_SBH": hidden_SBH,
        "labels_BS": torch.arange(6)[None],
        "weights_BS": torch.full((1, 6), 1 / 6),
        "chunk": 4,
    }
    trained, _ = weighted_cross_entropy(model, **arguments)
    with torch.no_grad():
        evaluated, _ = weighted_cross_entropy(model, **arguments)
    assert evaluated.item() == trained.item()
    assert not evaluated.requires_grad
