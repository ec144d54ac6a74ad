"""How large a cache a call takes: what its requests can fill, as far as memory goes.

Within a smaller cache the engine runs fewer requests at a time, so a bound costs time and no
answer; a single request that does not fit is refused with its numbers.
"""

import os
from collections.abc import Sequence

import psutil
import torch

from emu35.inference.arena import whole_pages
from emu35.inference.request import Request
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
    """Slots that fit into the free memory of the model's device. Tensor-parallel ranks have a GPU
    each, of which this one stands for all; on CPUs they share the memory of their host."""
    parameter = next(model.parameters())
    if parameter.is_cuda:
        free, _ = torch.cuda.mem_get_info(parameter.device)
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = psutil.virtual_memory().available // ranks
    return int(free * _SHARE) // slot_bytes(model)


def slot_bytes(model: Emu35Model) -> int:
    """Memory of one slot: a key and a value of every head of every layer on this rank."""
    config = model.lm_config
    heads = config.num_kv_heads // model.config.tensor_model_parallel_size
    numbers = 2 * config.num_layers * heads * config.head_dim
    return numbers * next(model.parameters()).element_size()
