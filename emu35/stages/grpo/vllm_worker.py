"""What runs inside vLLM's workers: new weights from buckets, and our behaviour policy.

A server for rollouts is started as ::

    VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve RELEASE \\
        --hf-overrides '{"architectures": ["Qwen3ForCausalLM"]}' \\
        --logprobs-mode processed_logprobs \\
        --worker-extension-cls emu35.stages.grpo.vllm_worker.WeightExtension \\
        --logits-processors emu35.stages.grpo.vllm_plugin.PolicyProcessor

The dev mode has ``/collective_rpc``, ``/pause`` and ``/resume``; ``processed_logprobs`` are those
behind our processor, so of the distribution that tokens are drawn from. Nothing in here imports
vLLM: the extension is mixed into its worker, and the policy is a function of ids and logits.

vLLM feeds one stream a request and decides alone which requests share a step, so the two streams of
a guided request cannot be kept together by a plug-in: guidance other than 1 is refused.
"""

import base64
from typing import Any

import torch

from emu35.checkpoint.buckets import INITIAL, decode, weights_tag
from emu35.checkpoint.whole_tensors import WholeTensors
from emu35.errors import CheckpointError
from emu35.inference.grammar import Grammar, NextKind, SizeIds
from emu35.inference.sampler import restrict
from emu35.stages.serve.exact import ExactArguments
from emu35.tokens.text import TextTokenizer


class WeightExtension:
    """Methods that vLLM's worker gets (``--worker-extension-cls``), called on every worker through
    ``/collective_rpc``. Each answers what it did, or ``{"error": ...}``: an exception in a worker
    may end the server. ``model_runner`` is vLLM's."""

    model_runner: Any
    _emu35_incoming: WholeTensors | None = None
    _emu35_version: int = 0
    _emu35_digests: list[str]
    _emu35_tag: str = INITIAL

    def emu35_begin(self, version: int) -> dict[str, Any]:
        """Weights ``version`` follow; generation is paused."""
        self._emu35_incoming, self._emu35_version = WholeTensors(), int(version)
        self._emu35_digests, self._emu35_tag = [], "incomplete"
        return {"version": self._emu35_version}

    def emu35_bucket(self, content: str, digest: str) -> dict[str, Any]:
        """Load the tensors that are whole with one more bucket (:func:`~.buckets.encode`, base64).
        vLLM splits and fuses them as it does those of a file. The last one may come again."""
        if self._emu35_incoming is None:
            return {"error": "no update was begun"}
        try:
            bucket = decode(base64.b64decode(content))
            if (found := bucket.digest()) != digest:
                return {"error": f"bucket {bucket.layout.index} has SHA-256 {found}, not {digest}"}
            if self._emu35_digests and found == self._emu35_digests[-1]:
                return {"bucket": bucket.layout.index}
            self.model_runner.model.load_weights(self._emu35_incoming.feed(bucket))
        except (CheckpointError, ValueError) as error:
            return {"error": str(error)}
        self._emu35_digests.append(digest)
        return {"bucket": bucket.layout.index}

    def emu35_commit(self, tag: str) -> dict[str, Any]:
        """All came, and is what the trainer calls ``tag``."""
        if self._emu35_incoming is None:
            return {"error": "no update was begun"}
        found = weights_tag(self._emu35_version, self._emu35_digests)
        if found != tag:
            return {"error": f"the buckets that came are {found}, not {tag}"}
        try:
            self._emu35_incoming.finish()
        except CheckpointError as error:
            return {"error": str(error)}
        self._emu35_incoming, self._emu35_tag = None, found
        return {"weights": found}

    def emu35_weights(self) -> dict[str, Any]:
        """What the weights in use are called."""
        return {"weights": self._emu35_tag}


def policy_problems(arguments: ExactArguments) -> list[str]:
    """What a stock vLLM cannot do of a request, as sentences."""
    found: list[str] = []
    if arguments.guidance != 1 and arguments.images:
        found.append(
            f"guidance={arguments.guidance}: vLLM feeds one stream a request; use guidance 1, or "
            "emu35 serve"
        )
    for name, sampling in (("text", arguments.text), ("image", arguments.visual)):
        if sampling.temperature <= 0:
            found.append(f"{name}_temperature={sampling.temperature} must be positive")
    return found


class RowPolicy:
    """The behaviour policy of one request: what may come next, and how likely, given what came.
    The same legal sets, temperatures, top-k and top-p as our own engine's."""

    def __init__(
        self, arguments: ExactArguments, *, max_tokens: int, tokenizer: TextTokenizer
    ) -> None:
        self._arguments, self._max_tokens = arguments, max_tokens
        self._eos = tokenizer.vocabulary.eos
        self._grammar = Grammar(
            vocabulary=tokenizer.vocabulary,
            size_ids=SizeIds.of(tokenizer),
            options=arguments.grammar,
        )
        self._seen = 0

    def __call__(self, output_ids: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        """Logits [V] of the next token behind ``output_ids`` -> those of the policy, -inf where
        nothing may come."""
        for id in output_ids[self._seen :]:
            self._grammar.accept(id)
        self._seen = len(output_ids)
        policy_V = torch.full_like(logits_V, -torch.inf)
        arguments = self._arguments
        if arguments.max_images and self._grammar.images >= arguments.max_images:
            policy_V[self._eos] = 0.0  # vLLM's only way to end here; whoever asked drops it
            return policy_V
        step = self._grammar.next(room=self._max_tokens - self._seen)
        ids_N = torch.cat([torch.arange(*pair, device=logits_V.device) for pair in step.ranges])
        sampling = arguments.text if step.kind is NextKind.TEXT else arguments.visual
        scores_1M, columns_1M = restrict(logits_V[ids_N].float()[None], sampling=sampling)
        policy_V[ids_N[columns_1M[0]]] = scores_1M[0].to(policy_V.dtype)
        return policy_V
