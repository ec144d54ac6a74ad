"""``config.json`` of a release <-> our architecture section.

The official loader fills a missing field with the default of Emu3-8B, which is another model; so
every field is written, and none that decides the computation may be missing when reading.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emu35.config import LMConfig, Precision
from emu35.errors import ReleaseError
from emu35.tokens.vocabulary import Vocabulary

CONFIG_JSON = "config.json"
GENERATION_JSON = "generation_config.json"
EMU3, QWEN3 = "Emu3", "qwen3"
IMAGE_AREA = 1_048_576
"""Pixels of a generated image in the official recipes (t2i, x2i)."""

_LARGEST_FILE = 10 << 20
_INTEGERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}


def config_json(
    config: LMConfig, *, vocabulary: Vocabulary, precision: Precision, image_area: int
) -> dict[str, Any]:
    """Everything the official ``Emu3Config`` reads, and ``hidden_dropout``, which it does not:
    there one rate serves the residual branches and the attention probabilities alike."""
    return {
        "architectures": ["Emu3ForCausalLM"],
        "model_type": EMU3,
        "torch_dtype": {Precision.fp32: "float32", Precision.bf16: "bfloat16"}[precision],
        "vocab_size": vocabulary.size,
        **{official: getattr(config, ours) for ours, official in _INTEGERS.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "image_area": image_area,
        **_token_ids(vocabulary),
    }


def generation_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """Only the ids: sampling numbers belong to the task, not to the model."""
    ids = _token_ids(vocabulary)
    return {name: ids[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ReleaseError: missing, absurdly large, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ReleaseError(f"{path} has {path.stat().st_size:,} bytes; that is no such file")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ReleaseError(f"{path} is missing; is this a release folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReleaseError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ReleaseError(f"{path} holds no JSON object")
    return content


def parse_config(content: Mapping[str, Any], *, where: Path) -> LMConfig:
    """The architecture that a ``config.json`` of model type Emu3 or qwen3 describes.

    Raises:
        ReleaseError: naming every field that is missing, of the wrong type, or asks for something
            this architecture does not have (biases, another activation, scaled rotary positions).
    """
    if content.get("model_type") not in (EMU3, QWEN3):
        raise ReleaseError(
            f"{where}: model_type is {content.get('model_type')!r}; "
            f"only {EMU3!r} and {QWEN3!r} can be read"
        )
    content = _with_rope(content)
    problems: list[str] = []

    def number(name: str, *, kind: Callable[[Any], Any], default: Any = None) -> Any:
        value = content.get(name, default)
        allowed = (int,) if kind is int else (int, float)
        if isinstance(value, allowed) and not isinstance(value, bool):
            return kind(value)
        problems.append(f"{name} is {value!r}, not a number" if name in content else f"no {name}")
        return kind(1)

    dropout = number("attention_dropout", kind=float, default=0.0)
    config = LMConfig(
        **{ours: number(official, kind=int) for ours, official in _INTEGERS.items()},
        rope_theta=number("rope_theta", kind=float),
        rms_norm_eps=number("rms_norm_eps", kind=float),
        init_std=number("initializer_range", kind=float, default=0.02),
        attention_dropout=dropout,
        hidden_dropout=number("hidden_dropout", kind=float, default=dropout),
    )
    for name, allowed in _MUST_BE.items():
        if name in content and content[name] not in allowed:
            problems.append(f"{name} is {content[name]!r}, but only {allowed[0]!r} is supported")
    problems += config.problems()
    if problems:
        raise ReleaseError(f"{where}: " + "; ".join(problems))
    return config


def read_size(content: Mapping[str, Any], *, name: str, where: Path) -> int:
    """A field that must be a positive integer.

    Raises:
        ReleaseError: it is not.
    """
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ReleaseError(f"{where}: {name} is {value!r}, not a positive integer")
    return value


def _with_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Newer transformers write the rotary settings as one object; spread it out again."""
    found = dict(content)
    rope = found.pop("rope_parameters", None)
    if isinstance(rope, Mapping):
        found.setdefault("rope_theta", rope.get("rope_theta"))
        if rope.get("rope_type", "default") != "default":
            found["rope_scaling"] = dict(rope)
    return found


def _token_ids(vocabulary: Vocabulary) -> dict[str, int]:
    names = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")
    return {f"{name}_token_id": getattr(vocabulary, name) for name in names}
