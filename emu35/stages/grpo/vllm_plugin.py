"""Our behaviour policy as a logits processor of vLLM (``--logits-processors``); see
:mod:`emu35.stages.grpo.vllm_worker`. Imported by vLLM alone (extra ``rollout``)."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    AdapterLogitsProcessor,
)

from emu35.checkpoint.source import describe
from emu35.stages.grpo.vllm_worker import RowPolicy, policy_problems
from emu35.stages.serve.exact import ExactArguments
from emu35.tokens.text import build_text_tokenizer


class PolicyProcessor(AdapterLogitsProcessor):
    """Draws requests with ``vllm_xargs`` from their own policy, and leaves others alone."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what cannot be done, when the request comes.

        Raises:
            ValueError: naming it; vLLM answers 400.
        """
        _arguments(sampling_params)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._tokenizer = build_text_tokenizer(
            describe(Path(vllm_config.model_config.model)).tokenizer
        )

    def is_argmax_invariant(self) -> bool:
        """The grammar forbids likely tokens."""
        return False

    def new_req_logits_processor(self, params: Any) -> RowPolicy | None:
        """What is applied to a request's logits."""
        arguments = _arguments(params)
        if arguments is None:
            return None
        return RowPolicy(arguments, max_tokens=params.max_tokens, tokenizer=self._tokenizer)


def _arguments(params: Any) -> ExactArguments | None:
    if not params.extra_args:
        return None
    try:
        arguments = ExactArguments.model_validate(
            {name: params.extra_args[name] for name in ExactArguments.model_fields
             if name in params.extra_args}
        )  # fmt: skip
    except ValidationError as error:
        raise ValueError(f"vllm_xargs: {error}") from error
    if problems := policy_problems(arguments):
        raise ValueError("vllm_xargs: " + "; ".join(problems))
    return arguments
