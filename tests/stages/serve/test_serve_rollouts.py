"""A trainer that samples on ``emu35 serve``: the answers of the embedded engine for the same
requests, by the weights it has sent, and nothing by any others."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from remote_ranks_worker import trained as built
from test_serve_life import eventually, process
from torchrun_ranks import run_ranks
from trainer_side import UPDATED, Trainer, assert_same, embedded, requests

from emu35.checkpoint.source import describe, load_model
from emu35.config import Precision
from emu35.inference.request import Finish
from emu35.model.transformer import Emu35Model
from emu35.tokens.text import TextTokenizer

WORKER = Path(__file__).with_name("remote_ranks_worker.py")


def test_servers_answer_as_the_embedded_engine_by_the_weights_they_were_sent(
    start_server: Callable[..., Any],
    trainer_of: Callable[..., Trainer],
    trained: Emu35Model,
    tokenizer: TextTokenizer,
    drawing_run: Path,
) -> None:
    servers = [start_server(**UPDATED) for _ in range(2)]
    trainer = trainer_of(servers=[server.url for server in servers], bucket_bytes=2000)
    asked = requests(tokenizer)
    expected = embedded(trained, asked, tokenizer)
    before = load_model(describe(drawing_run), precision=Precision.fp32)
    assert [a.ids for a in embedded(before, asked, tokenizer)] != [a.ids for a in expected]
    assert {answer.finish for answer in expected} >= {Finish.images, Finish.stop, Finish.length}
    assert_same(trainer.sample(asked), expected)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    again = embedded(trained, asked, tokenizer)
    assert [a.ids for a in again] != [a.ids for a in expected]
    trainer.version = 2
    assert_same(trainer.sample(asked), again)
    counts = trainer.engine.counts
    assert counts.answered == 2 * len(asked)
    assert sum(trainer.engine.counts.metrics().values()) == counts.answered
    calls = [server.metric('emu35_requests_ended_total{reason="images"}') for server in servers]
    assert all(calls), "one server did everything"


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("tp", [1, 2])
def test_a_server_in_processes_of_its_own_answers_alike(
    drawing_run: Path,
    trainer_of: Callable[..., Trainer],
    trained: Emu35Model,
    tokenizer: TextTokenizer,
    tp: int,
) -> None:
    words = ["--run", str(drawing_run), "--precision", "fp32", "--weight-updates"]
    with process(*words, "--tp", str(tp)) as (running, url, _):
        assert eventually(lambda: httpx.get(f"{url}/health").status_code == 200, seconds=120)
        trainer = trainer_of(servers=[url], bucket_bytes=3000)
        asked = requests(tokenizer)
        assert_same(trainer.sample(asked), embedded(trained, asked, tokenizer))
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.1)
        trainer.version = 2
        assert_same(trainer.sample(asked), embedded(trained, asked, tokenizer))
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"zero1": True}, {"cp": 2}], ids=str)
def test_ranks_of_a_trainer_share_the_servers(
    updated_server: Any, drawing_run: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    result = tmp_path / "result.json"
    words = [str(WORKER), str(result), updated_server.url, str(drawing_run), json.dumps(parallel)]
    run_ranks(words, ranks=2, timeout=200)
    found = json.loads(result.read_text())
    tokenizer, _, (model,) = built(drawing_run, {})
    expected = embedded(model, requests(tokenizer), tokenizer)
    assert found["answers"] == [answer.ids for answer in expected]
    assert len(found["refusals"]) == 2
    assert all("no rollout server took weights 6" in each for each in found["refusals"])
