"""The parts that run inside vLLM, without vLLM: its sampler and its loader are stood in for, its
own code and a GPU are not here."""

import base64
from typing import Any

import pytest
import torch
from trainer_side import requests

from emu35.checkpoint.buckets import encode, pack, weights_tag
from emu35.inference.request import Finish
from emu35.inference.sampler import draw
from emu35.stages.grpo.remote_body import Reader, body_of
from emu35.stages.grpo.vllm_worker import RowPolicy, WeightExtension, policy_problems
from emu35.stages.serve.exact import ExactArguments
from emu35.tokens.text import TextTokenizer


class Loader:
    def __init__(self) -> None:
        self.got: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.got |= {name: tensor.clone() for name, tensor in weights}


class Worker(WeightExtension):
    def __init__(self) -> None:
        self.model_runner = type("Runner", (), {"model": Loader()})()


def test_a_worker_loads_whole_tensors_from_buckets_and_names_what_is_wrong() -> None:
    weights = {"embedding": torch.randn(50, 8), "norm": torch.randn(8)}
    buckets = list(pack(weights.items(), bucket_bytes=500))
    worker = Worker()
    first = base64.b64encode(encode(buckets[0])).decode()
    assert worker.emu35_bucket(first, buckets[0].digest()) == {"error": "no update was begun"}
    worker.emu35_begin(3)
    assert "has SHA-256" in worker.emu35_bucket(first, "0" * 64)["error"]
    for bucket in buckets:
        content = base64.b64encode(encode(bucket)).decode()
        for _ in range(2):
            assert worker.emu35_bucket(content, bucket.digest()) == {"bucket": bucket.layout.index}
    tag = weights_tag(3, [bucket.digest() for bucket in buckets])
    assert "not other" in worker.emu35_commit("other")["error"]
    assert worker.emu35_commit(tag) == {"weights": tag}
    got = worker.model_runner.model.got
    assert all(torch.equal(got[name], tensor) for name, tensor in weights.items())


def arguments_of(request: Any) -> ExactArguments:
    return ExactArguments.model_validate(body_of(request, model="m")["vllm_xargs"])


def test_a_policy_applied_to_logits_draws_what_our_reader_believes(
    tokenizer: TextTokenizer,
) -> None:
    vocabulary = tokenizer.vocabulary
    generator = torch.Generator().manual_seed(0)
    finishes: set[Finish] = set()
    for request in requests(tokenizer):
        if request.guided or request.keep_candidates or request.stop:
            continue
        policy = RowPolicy(
            arguments_of(request), max_tokens=request.max_new_tokens, tokenizer=tokenizer
        )
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < request.max_new_tokens:
            logits_V = torch.randn(vocabulary.size, generator=generator)
            policy_V = policy(ids, logits_V)
            # vLLM at temperature 1: a draw from the softmax, and its processed log-probability.
            logprob_V = policy_V.log_softmax(-1)
            ids.append(int(logprob_V.exp().multinomial(1, generator=generator)))
            logprobs.append(float(logprob_V[ids[-1]]))
            if ids[-1] == vocabulary.eos:
                break
        choice = {
            "token_ids": ids,
            "prompt_token_ids": list(request.prompt),
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": "length" if len(ids) == request.max_new_tokens else "stop",
        }
        answer = Reader(tokenizer).answer({"choices": [choice]}, request=request, index=4)
        finishes.add(answer.finish)
        assert answer.index == 4
        assert answer.ids == ids[: len(answer.ids)]
        for token, logprob in zip(answer.tokens, logprobs, strict=False):
            assert token.logprob == (0 if token.forced else logprob)
    assert Finish.images in finishes


def test_a_policy_leaves_the_candidates_that_our_sampler_draws_from(
    tokenizer: TextTokenizer,
) -> None:
    kept = requests(tokenizer)[4]
    policy = RowPolicy(arguments_of(kept), max_tokens=50, tokenizer=tokenizer)
    logits_V = torch.randn(tokenizer.vocabulary.size)
    policy_V = policy([], logits_V)
    legal_V = RowPolicy(
        arguments_of(kept).model_copy(update={"text_top_k": 0, "text_top_p": 1.0}),
        max_tokens=50,
        tokenizer=tokenizer,
    )([], logits_V)
    scores_1V = logits_V.where(legal_V.isfinite(), -torch.inf)[None]
    zero = torch.zeros(1, dtype=torch.int64)
    drawn = draw(scores_1V, sampling=kept.text, seeds_N=zero, positions_N=zero)
    assert int(policy_V.isfinite().sum()) == int(drawn.support_N)
    own = policy_V.log_softmax(-1)[drawn.columns_N]
    torch.testing.assert_close(own, drawn.logprobs_N)


def test_a_stock_vllm_refuses_guidance(tokenizer: TextTokenizer) -> None:
    plain, guided, *_ = requests(tokenizer)
    assert policy_problems(arguments_of(plain)) == []
    (problem,) = policy_problems(arguments_of(guided))
    assert "guidance=2.5" in problem


@pytest.mark.parametrize("number", range(5))
def test_what_is_asked_is_what_a_server_understands(tokenizer: TextTokenizer, number: int) -> None:
    request = requests(tokenizer)[number]
    understood = arguments_of(request).request(
        list(request.prompt),
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        stop=request.stop,
        top=request.top_logprobs,
    )
    assert understood.guided == request.guided
    if not request.guided:
        assert list(understood.unconditional) == []
        understood = type(request)(
            **{
                name: getattr(understood, name)
                for name in request.__dataclass_fields__
                if name != "unconditional"
            },
            unconditional=request.unconditional,
        )
    assert understood == request
