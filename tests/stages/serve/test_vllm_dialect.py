"""The client against a server that speaks as vLLM does: its paths, its bodies, its silence about
support, candidates and weights. Behind them stand our own worker's methods; vLLM itself, and a GPU,
are not here."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from test_vllm_worker import Worker
from trainer_side import Trainer, requests

from emu35.errors import ConfigError, LaunchError
from emu35.model.shapes import hf_shapes
from emu35.model.transformer import Emu35Model
from emu35.stages.grpo.vllm_worker import RowPolicy, policy_problems
from emu35.stages.serve.exact import ExactArguments
from emu35.tokens.text import TextTokenizer


class LikeVLLM(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tokenizer: TextTokenizer
    workers: list[Worker]
    said: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.send(200, {"object": "list", "data": [{"id": "/models/emu", "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.said.append(self.path)
        if self.path == "/collective_rpc":
            body = json.loads(content)
            self.said[-1] += f" {body['method']}"
            results = [getattr(each, body["method"])(*body["args"]) for each in self.workers]
            self.send(200, {"results": results})
        elif self.path == "/v1/completions":
            self.complete(json.loads(content))
        else:
            self.send(200, {"status": "fine"})

    def complete(self, body: dict[str, Any]) -> None:
        assert body["model"] == "/models/emu"
        assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 1.0, 0)
        arguments = ExactArguments.model_validate(body["vllm_xargs"])
        if problems := policy_problems(arguments):
            self.send(400, {"error": {"message": problems[0]}})
            return
        eos = self.tokenizer.vocabulary.eos
        policy = RowPolicy(arguments, max_tokens=body["max_tokens"], tokenizer=self.tokenizer)
        generator = torch.Generator().manual_seed(body["seed"])
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"] and ids[-1:] != [eos]:
            logits_V = torch.randn(self.tokenizer.vocabulary.size, generator=generator)
            logprob_V = policy(ids, logits_V).log_softmax(-1)
            ids.append(int(logprob_V.exp().multinomial(1, generator=generator)))
            logprobs.append(float(logprob_V[ids[-1]]))
        choice = {
            "index": 0,
            "text": "...",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": logprobs, "tokens": ["?"] * len(ids)},
            "finish_reason": "stop" if ids[-1] == eos else "length",
        }
        self.send(200, {"choices": [choice], "usage": {}})


@pytest.fixture
def like_vllm(tokenizer: TextTokenizer) -> Iterator[Any]:
    workers, said = [Worker(), Worker()], list[str]()
    handler = type("Own", (LikeVLLM,), {"tokenizer": tokenizer, "workers": workers, "said": said})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", workers, said
    server.shutdown()
    server.server_close()
    thread.join()


def test_rollouts_and_weights_in_vllms_words(
    like_vllm: Any,
    trainer_of: Callable[..., Trainer],
    trained: Emu35Model,
    tokenizer: TextTokenizer,
) -> None:
    url, workers, said = like_vllm
    trainer = trainer_of(servers=[url], bucket_bytes=20_000)
    plain = requests(tokenizer)[0]
    (answer, again) = trainer.sample([plain, plain])
    assert answer.ids == again.ids
    assert len(answer.document.images) == 1
    vocabulary = tokenizer.vocabulary
    for token in answer.tokens:
        drawn = 1 if token.forced else vocabulary.size - vocabulary.visual_start
        assert token.support == drawn
        assert token.candidates is None
    assert said[:2] == ["/pause?mode=abort", "/collective_rpc emu35_begin"]
    assert said[-1] == "/collective_rpc emu35_weights"
    order = [word for word in said if "bucket" not in word and "completions" not in word]
    assert order[2:5] == ["/collective_rpc emu35_commit", "/reset_prefix_cache", "/resume"]
    shapes = hf_shapes(trained.lm_config, vocabulary_size=trained.vocabulary_size)
    for worker in workers:
        got = worker.model_runner.model.got
        assert {name: tuple(tensor.shape) for name, tensor in got.items()} == shapes
        weight = trained.get_parameter("output_layer.weight")
        assert torch.equal(got["lm_head.weight"], weight[: trained.vocabulary_size])


def test_what_vllm_cannot_do_is_said(
    like_vllm: Any, trainer_of: Callable[..., Trainer], tokenizer: TextTokenizer
) -> None:
    url, _, _ = like_vllm
    plain, guided, *_, kept, _, _ = requests(tokenizer)
    kept = next(each for each in requests(tokenizer) if each.keep_candidates)
    with pytest.raises(ConfigError, match=r"vLLM does not report which ids top-k"):
        trainer_of(servers=[url]).sample([kept])
    with pytest.raises(ConfigError, match=r"cannot answer a rollout: .*guidance=2\.5"):
        trainer_of(servers=[url]).sample([plain, guided])


def test_what_is_only_judged_may_be_drawn_from_a_part(
    like_vllm: Any, trainer_of: Callable[..., Trainer], tokenizer: TextTokenizer
) -> None:
    """Nothing is replayed of it, so nobody has to know what top-k and top-p left."""
    url, _, _ = like_vllm
    kept = next(each for each in requests(tokenizer) if each.keep_candidates and not each.guided)
    (answer,) = trainer_of(servers=[url]).sample([replace(kept, keep_candidates=False)])
    assert len(answer.ids) == kept.max_new_tokens or answer.ids[-1] == tokenizer.vocabulary.eos
    assert {token.support for token in answer.tokens if not token.forced} == {0}


def test_a_vllm_that_was_started_again_ends_the_step(
    like_vllm: Any, trainer_of: Callable[..., Trainer], tokenizer: TextTokenizer
) -> None:
    url, workers, _ = like_vllm
    trainer = trainer_of(servers=[url])
    trainer.sample(requests(tokenizer)[:1])
    workers[1].__dict__.pop("_emu35_tag")
    with pytest.raises(LaunchError, match=r"its weights are 'initial', not '1-.*nothing was train"):
        trainer.sample(requests(tokenizer)[:1])


def test_a_worker_that_cannot_load_leaves_its_server_out(
    like_vllm: Any, trainer_of: Callable[..., Trainer], tokenizer: TextTokenizer
) -> None:
    url, workers, said = like_vllm

    def refuse(weights: Any) -> None:
        raise ValueError("no module named lm_head")

    workers[1].model_runner.model.load_weights = refuse
    with pytest.raises(LaunchError, match=r"no module named lm_head"):
        trainer_of(servers=[url]).sample(requests(tokenizer)[:1])
    assert "/resume" not in said, "what is half-way stays paused"
