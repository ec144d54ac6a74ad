"""A model that is split over ranks answers as the whole one does."""

import json
from pathlib import Path

import pytest
from denoise_engine import denoise, ranks_requests
from tiny_engine import generate, mixed_requests
from torchrun_ranks import run_ranks

from emu35.config import PathKind

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
DENOISER = Path(__file__).with_name("denoise_ranks_worker.py")
LEADER = Path(__file__).with_name("lead_worker.py")


@pytest.mark.multiproc
def test_two_ranks_answer_as_one_process_does(tmp_path: Path) -> None:
    result = tmp_path / "answers.json"
    run_ranks([str(WORKER), str(result)], ranks=2, timeout=180)
    first, second = json.loads(result.read_text())
    assert first == second
    alone = generate(mixed_requests(), at_once=8)
    assert [(index, ids) for index, ids, _ in first] == [(a.index, a.ids) for a in alone[1:]]


@pytest.mark.multiproc
@pytest.mark.slow
def test_two_ranks_decode_in_parallel_as_one_process_does(tmp_path: Path) -> None:
    result = tmp_path / "answers.json"
    run_ranks([str(DENOISER), str(result)], ranks=2, timeout=180)
    alone = denoise(ranks_requests(), kind=PathKind.mixture_uniform)
    assert json.loads(result.read_text()) == [answer.ids for answer in alone]


@pytest.mark.multiproc
def test_a_rank_that_leads_may_build_engines_anew_and_knows_a_torn_one(tmp_path: Path) -> None:
    result = tmp_path / "answers.json"
    run_ranks([str(LEADER), str(result)], ranks=2, timeout=180)
    found = json.loads(result.read_text())
    alone = [answer.ids for answer in generate(mixed_requests(), at_once=8)]
    first, second = found["answers"]
    assert first[: len(alone)] == second[: len(alone)] == alone
    assert "lost each other in a step that failed (MemoryError" in found["refusal"]
