"""The cache of a call: as large as its requests need, within memory."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import tiny_lm
from tiny_source import options, rows

from emu35.errors import ConfigError
from emu35.inference import memory
from emu35.inference.arena import whole_pages
from emu35.inference.grammar import GrammarOptions
from emu35.inference.request import Request
from emu35.model.build import build_model
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.generate.run import generate


def test_the_largest_requests_decide() -> None:
    single_process_mesh()
    model = build_model(tiny_lm(), vocabulary_size=300)
    plain = Request(prompt=[1], max_new_tokens=100)
    long = replace(plain, max_new_tokens=1000)
    guided = replace(plain, unconditional=[1, 2], guidance=2.0)
    text = replace(guided, grammar=GrammarOptions(images=False))
    one, ten = whole_pages(101), whole_pages(1001)
    assert memory.request_slots(guided) == one + whole_pages(102)
    assert memory.request_slots(text) == one
    requests = [plain, long, plain]
    assert memory.cache_tokens(requests, model=model, at_once=2) == ten + one
    assert memory.cache_tokens(requests, model=model, at_once=9) == ten + 2 * one
    # Two layers of two heads of 16, a key and a value each, in fp32.
    assert memory.slot_bytes(model) == 2 * 2 * 2 * 16 * 4


def test_memory_bounds_the_cache_and_a_prompt_that_exceeds_it_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = generate(options(run, tmp_path / "a"))
    # A slot has 2 * 16 numbers in fp32; a request is two streams of less than 64 slots.
    free = int(2 * 64 * 2 * 16 * 4 / 0.8) + 1
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    tight = generate(options(run, tmp_path / "b"))
    assert [a.ids for a in tight.answers] == [a.ids for a in roomy.answers]
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    with pytest.raises(ConfigError, match="raise cache_tokens"):
        generate(options(run, tmp_path / "b"))
    assert len(rows(tmp_path / "b")) == 3, "what was there before is gone"
    generate(options(run, tmp_path / "d", cache_tokens=4096))
