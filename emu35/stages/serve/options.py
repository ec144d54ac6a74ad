"""What a server is started with."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from emu35.config import Precision
from emu35.errors import ConfigError
from emu35.inference.ask import MAX_REFERENCES
from emu35.model.quantize import Quantization
from emu35.tokens.template import PromptTemplate

DEFAULT_PORT = 8000

ALIAS = "emu35"
"""A name under which every server's model is known, for clients that were written for no run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a single call may ask for. ``max_body_mb`` are MiB of its body (pictures are base64, a
    third larger than their files), ``max_image_pixels`` those of one picture as it arrives,
    ``max_references`` the pictures of one call, earlier turns included."""

    max_body_mb: int = 64
    max_image_pixels: int = 2**25
    max_references: int = MAX_REFERENCES

    @property
    def body_bytes(self) -> int:
        """``max_body_mb`` in bytes."""
        return self.max_body_mb * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """One call of ``emu35 serve``.

    ``source`` is a run or a release, ``vision`` overrides its image tokenizer, ``template`` the
    form of its prompts. ``max_requests`` are generated at a time and ``max_waiting`` more may wait;
    ``max_length`` (prompt and answer, in tokens; None: the model's positions) and ``cache_tokens``
    bound the memory. ``model_name`` is what clients call the model (None: as the source is called;
    :data:`ALIAS` does as well). ``port`` 0 takes a free one. ``grace``: seconds that running
    requests get after SIGTERM. ``api_key_env`` names the environment variable that holds the key
    clients must send; the key itself never stands on a command line. ``quantize`` gives the layers'
    weights eight bits. ``tp`` ranks share the model, of which this process is one. With
    ``weight_updates`` a trainer may replace the weights, in buckets of ``max_bucket_mb`` MiB.
    """

    source: Path
    step: int | None = None
    vision: Path | None = None
    template: PromptTemplate | None = None
    precision: Precision | None = None
    quantize: Quantization | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    max_requests: int = 16
    max_waiting: int = 256
    cache_tokens: int | None = None
    max_length: int | None = None
    limits: Limits = field(default_factory=Limits)
    grace: float = 30.0
    api_key_env: str | None = None
    tp: int = 1
    weight_updates: bool = False
    max_bucket_mb: int = 1024

    def api_key(self) -> str | None:
        """The key that clients must send; None where none is asked for."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None


def check(options: ServeOptions) -> None:
    """Refuse options that no source could satisfy.

    Raises:
        ConfigError: naming every problem.
    """
    limits = options.limits
    problems = [
        f"{name}={value} is too small; use at least {lowest}"
        for name, value, lowest in (
            ("max_requests", options.max_requests, 1),
            ("max_waiting", options.max_waiting, 1),
            ("cache_tokens", options.cache_tokens, 1),
            ("max_length", options.max_length, 2),
            ("max_body_mb", limits.max_body_mb, 1),
            ("max_image_pixels", limits.max_image_pixels, 1),
            ("max_references", limits.max_references, 0),
            ("max_bucket_mb", options.max_bucket_mb, 1),
        )
        if value is not None and value < lowest
    ]
    if limits.max_references > MAX_REFERENCES:
        problems.append(
            f"max_references={limits.max_references} must be at most {MAX_REFERENCES}, which is "
            "what a dialogue takes"
        )
    if options.model_name is not None and not options.model_name.strip():
        problems.append(f"model_name={options.model_name!r} is no name; leave it out or give one")
    if not 0 <= options.port <= 65535:
        problems.append(f"port={options.port} must lie in 0..65535; 0 takes a free one")
    if not (math.isfinite(options.grace) and options.grace >= 0):
        problems.append(f"grace={options.grace} must be a number of seconds, 0 or more")
    if options.api_key_env and not options.api_key():
        problems.append(
            f"the environment variable {options.api_key_env} is empty or not set; "
            "put the API key in it"
        )
    if options.weight_updates and options.quantize is not None:
        problems.append(
            f"weight_updates replaces weights as they are, and quantize={options.quantize} changes "
            "them; use one of the two"
        )
    if problems:
        raise ConfigError(problems)
