"""The cache of a call: what its requests can fill, as far as memory goes.

Within a smaller cache the engine runs fewer requests at a time, so a bound costs time and no
answer; a single request that does not fit is refused with its numbers.
"""

import os
from collections.abc import Sequence

import psutil
import torch

from emu35.inference.arena import whole_pages
from emu35.inference.request import Request
from emu35.model.cache import KVCache
from emu35.model.transformer import Emu35Model

_SHARE = 0.8
"""Of the free memory; the rest is for activations and the image tokenizer."""


def request_slots(request: Request) -> int:
    """Slots of the cache that ``request`` can fill, its one or two streams together."""
    return sum(whole_pages(len(prompt) + request.max_new_tokens) for prompt in request.prompts)


def cache_tokens(requests: Sequence[Request], *, model: Emu35Model, at_once: int) -> int:
    """Slots for the largest ``at_once`` of ``requests``, or as many as memory has room for."""
    largest = sorted(map(request_slots, requests), reverse=True)[:at_once]
    return min(sum(largest), free_slots(model))


def free_slots(model: Emu35Model) -> int:
    """Slots that fit into the free memory of the model's device, to which torch's allocator gives
    back what it holds in reserve. On CPUs ranks share the memory of their host.

    This rank's own number. Where each tensor-parallel rank builds its engine for itself, all of
    them take the smallest (:func:`~emu35.inference.ranks.agree_on_least`): schedulers with caches
    of different sizes part company. Where one leads (:mod:`emu35.inference.lead`), the others are
    told its number.
    """
    parameter = next(model.parameters())
    if parameter.is_cuda:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(parameter.device)
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = psutil.virtual_memory().available // ranks
    return int(free * _SHARE) // slot_bytes(model)


def slot_bytes(model: Emu35Model) -> int:
    """Memory of one slot: a key and a value of every head of every layer on this rank."""
    config = model.lm_config
    numbers = 2 * config.num_layers * _heads(model) * config.head_dim
    return numbers * next(model.parameters()).element_size()


def allocate(model: Emu35Model, *, slots: int, rows: int) -> tuple[KVCache, torch.Tensor]:
    """The cache, and the newest hidden state [R, H] of every stream: one whose partner is still
    reading its prompt keeps what the next token is predicted from."""
    config, parameter = model.lm_config, next(model.parameters())
    cache = KVCache(
        num_layers=config.num_layers,
        slots=slots,
        num_kv_heads=_heads(model),
        head_dim=config.head_dim,
        dtype=parameter.dtype,
        device=parameter.device,
    )
    last_RH = torch.zeros(rows, config.hidden_size, dtype=parameter.dtype, device=parameter.device)
    return cache, last_RH


def _heads(model: Emu35Model) -> int:
    """Heads of keys and values on this rank."""
    return model.lm_config.num_kv_heads // model.config.tensor_model_parallel_size
