"""Random number generators as part of a run's state.

Every rank has its own: Python's, numpy's, torch's on the CPU and on its GPU, and megatron-core's
tracker, which keeps one CUDA state per purpose (dropout inside and outside tensor-parallel
regions). All of them are saved, one small file a rank, as tensors and plain numbers only, so that
the file loads with ``weights_only=True``.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emu35.parallel.collectives import rank, world_size


def capture() -> dict[str, Any]:
    """The state of every generator of this rank."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if (tracker := _megatron_tracker()) is not None:
        state["megatron"] = {key: value.clone() for key, value in tracker.get_states().items()}
    return state


def restore(state: dict[str, Any]) -> None:
    """Put every generator back into a state that :func:`capture` gave."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker = _megatron_tracker()
    if "megatron" in state and tracker is not None:
        tracker.set_states({key: value.clone() for key, value in state["megatron"].items()})


@contextmanager
def preserved() -> Iterator[None]:
    """Leave every generator as it was, whatever the body draws (validation, sampling)."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def save(folder: Path) -> None:
    """Write this rank's generators into ``folder``; every rank calls it."""
    torch.save({"layout": _layout(), **capture()}, folder / _file_name())


def load(folder: Path) -> bool:
    """Restore this rank's generators from ``folder``.

    Returns:
        False, and nothing changed, where the file was written in another layout: then the streams
        of the old ranks belong to none of the new ones (tensor-parallel ranks must share theirs,
        replicas must not), and those seeded at start stay.
    """
    path = folder / _file_name()
    if not path.exists():
        return False
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state.pop("layout") != _layout():
        return False
    restore(state)
    return True


def _layout() -> dict[str, int]:
    """What decides which ranks share a stream."""
    state = _megatron_groups()
    if state is None:
        return {"world": world_size(), "tp": 1, "pp": 1, "vpp": 1, "cp": 1}
    return {
        "world": world_size(),
        "tp": state.get_tensor_model_parallel_world_size(),
        "pp": state.get_pipeline_model_parallel_world_size(),
        "vpp": state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": state.get_context_parallel_world_size(),
    }


def _file_name() -> str:
    return f"rng_{rank():05d}.pt"


def _megatron_tracker() -> Any:
    """megatron-core's tracker once its groups exist; never imports megatron by itself."""
    tracker = sys.modules.get("megatron.core.tensor_parallel.random")
    if tracker is None or _megatron_groups() is None:
        return None
    return tracker.get_cuda_rng_tracker()


def _megatron_groups() -> Any:
    """megatron-core's ``parallel_state`` once it is initialised."""
    state = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None
