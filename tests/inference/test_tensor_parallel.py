"""A model that is split over ranks answers as the whole one does."""

import json
from pathlib import Path

import pytest
from tiny_engine import generate, mixed_requests
from torchrun_ranks import run_ranks

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


@pytest.mark.multiproc
def test_two_ranks_answer_as_one_process_does(tmp_path: Path) -> None:
    result = tmp_path / "answers.json"
    run_ranks([str(WORKER), str(result)], ranks=2, timeout=180)
    first, second = json.loads(result.read_text())
    assert first == second
    alone = generate(mixed_requests(), at_once=8)
    assert [(index, ids) for index, ids, _ in first] == [(a.index, a.ids) for a in alone[1:]]
