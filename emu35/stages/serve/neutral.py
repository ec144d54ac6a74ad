"""Fields of OpenAI's interface that clients send by themselves and that change nothing here.

A value that asks for something we do not have is refused; these are the ones that ask for nothing.
"""

from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"], ["text", "image"]),
    "reasoning_effort": (None,),
    "prediction": (None,),
    "audio": (None,),
    "web_search_options": (None,),
    "verbosity": (None,),
    "moderation": (None,),
}
"""OpenAI's fields that do nothing here -> the values that ask for nothing."""

MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": (None, ""),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
}
"""The same of a message: what OpenAI's client writes when an answer is sent back."""

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)
"""Fields about the caller and what a service keeps, which no answer depends on."""
