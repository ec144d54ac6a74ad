"""Usage, perplexity and bits of codes whose frequencies are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu35.vision.code_usage import code_usage


def test_codes_used_equally_often_have_as_much_perplexity_as_there_are() -> None:
    counts = torch.zeros(1024, dtype=torch.int64)
    counts[:64] = 5
    found = code_usage(counts)
    assert (found.codes, found.used, found.usage) == (320, 64, 0.0625)
    assert found.perplexity == pytest.approx(64)
    assert found.bits_per_pixel(factor=16) == 10 / 256
    assert found.entropy_bits_per_pixel(factor=16) == pytest.approx(6 / 256)


def test_a_single_code_tells_nothing() -> None:
    found = code_usage(torch.tensor([0, 9, 0, 0]))
    assert (found.used, found.entropy, found.perplexity) == (1, 0.0, 1.0)


def test_no_code_is_no_error() -> None:
    found = code_usage(torch.zeros(8, dtype=torch.int64))
    assert (found.codes, found.used, found.perplexity) == (0, 0, 1.0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_perplexity_is_that_of_the_definition(counts: list[int]) -> None:
    found = code_usage(torch.tensor(counts))
    shares = [count / sum(counts) for count in counts if count]
    assert found.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-9)
    assert found.perplexity <= found.used * (1 + 1e-9)
