"""The engine on one GPU: greedy answers as on the CPU, drawn ones as in any company."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))


def test_greedy_answers_equal_those_of_a_plain_loop() -> None:
    from tiny_engine import generate, mixed_requests, plain_generate, sampling

    cold = sampling(temperature=0)
    requests = [replace(each, text=cold, visual=cold) for each in mixed_requests()]
    expected = [plain_generate(request) for request in requests]
    assert [answer.ids for answer in generate(requests, at_once=8)] == expected


def test_answers_do_not_depend_on_company() -> None:
    from tiny_engine import generate, mixed_requests

    requests = mixed_requests()
    together = [answer.ids for answer in generate(requests, at_once=8)]
    assert [answer.ids for answer in generate(requests, at_once=1)] == together


def test_the_cache_lies_on_the_gpu() -> None:
    from tiny_engine import TOKENIZER, model

    from emu35.inference.engine import Engine

    before = torch.cuda.memory_allocated()
    engine = Engine(model=model(), tokenizer=TOKENIZER, max_length=200, cache_tokens=1 << 16)
    # Two layers, two heads of 16, keys and values, fp32.
    assert torch.cuda.memory_allocated() - before >= (1 << 16) * 2 * 2 * 16 * 2 * 4
    assert engine.stats.cache_tokens == 1 << 16


def test_what_the_allocator_holds_in_reserve_is_room_for_the_cache() -> None:
    from tiny_engine import model

    from emu35.inference.memory import free_slots

    built = model()
    roomy = free_slots(built)
    free, _ = torch.cuda.mem_get_info()
    torch.empty(free // 2, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info()[0] < 0.6 * free, "nothing was held in reserve"
    assert free_slots(built) > 0.95 * roomy
