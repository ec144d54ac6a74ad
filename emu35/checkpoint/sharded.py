"""Model and optimizer through megatron-core's distributed checkpointing.

Every tensor is written under its name in the unpartitioned model with the place of each shard, so
that a checkpoint of one layout loads into another. The optimizer of ZeRO-1 uses the
``fully_reshardable`` form: mcore's default form refuses other layouts.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from emu35.checkpoint.agree import on_all_ranks
from emu35.checkpoint.unpickle import refuse_code
from emu35.errors import CheckpointError
from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu
from emu35.parallel.collectives import is_main

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedStateDict  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402

# torch's own CheckpointException is not an Exception: it derives from BaseException.
_MISFITS = (
    CheckpointingException,
    CheckpointException,
    KeyError,
    RuntimeError,
    ValueError,
    OSError,
)

STATE_FOLDER = "state"
LAYOUT_FILE = "layout.json"


def save(folder: Path, *, chunks: list[Emu35Model], optimizer: MegatronOptimizer | None) -> None:
    """Write ``folder/state``; every rank calls it. Without an optimizer only weights are kept."""
    target = folder / STATE_FOLDER

    def prepare() -> None:
        if is_main():
            target.mkdir()
            layout = {"zero1": _is_zero1(optimizer)} if optimizer is not None else {}
            (folder / LAYOUT_FILE).write_text(json.dumps(layout), encoding="utf-8")

    # Not left to the collective save below: it would wait for a rank 0 that failed here.
    on_all_ranks(prepare, blame=lambda why: f"cannot write into {folder}: {why}")
    dist_checkpointing.save(
        _sharded_state(chunks, optimizer=optimizer, is_loading=False),
        str(target),
        sharded_strategy=_InProcessWriter("torch_dist", 1),
    )


def load(folder: Path, *, chunks: list[Emu35Model], optimizer: MegatronOptimizer) -> None:
    """Restore weights and optimizer in place, in any tensor, pipeline and data layout.

    Raises:
        CheckpointError: if the folder does not fit this model, or was written with the other value
            of parallel.zero1 (the two optimizers keep their state in different forms).
    """
    layout = json.loads((folder / LAYOUT_FILE).read_text(encoding="utf-8"))
    here = _is_zero1(optimizer)
    if layout.get("zero1", here) != here:
        raise CheckpointError(
            f"{folder} was written with parallel.zero1={str(layout['zero1']).lower()}; "
            "resume with the same value"
        )
    state = _read(folder, _sharded_state(chunks, optimizer=optimizer, is_loading=True))
    _load_chunks(state, chunks=chunks)
    if not here:
        _count_from_zero(state["optimizer"], optimizer=optimizer)
    optimizer.load_state_dict(state["optimizer"])
    _separate_steps(optimizer)


def load_weights(folder: Path, *, chunks: list[Emu35Model]) -> None:
    """Restore weights alone, in any layout.

    Raises:
        CheckpointError: if the folder does not fit this model.
    """
    state = _read(folder, _sharded_state(chunks, optimizer=None, is_loading=True))
    _load_chunks(state, chunks=chunks)


def load_model_only(folder: Path, model: Emu35Model) -> None:
    """Restore the weights of a model that is whole in this process.

    Raises:
        CheckpointError: if the folder does not fit this model.
    """
    load_weights(folder, chunks=[model])


class _InProcessWriter(TorchDistSaveShardedStrategy):
    """mcore's plan of who writes what, carried out by torch's own file writer in this process.

    mcore's writer spawns a manager process and forks workers at every save, even a synchronous
    one: seconds of overhead, a deadlock with gloo's threads, and children that outlive a killed
    trainer. The files are the same and so is the reader.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp_save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=False),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def _sharded_state(
    chunks: list[Emu35Model], *, optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # Needed by fully_reshardable: gather over the ordinary group, whatever its backend.
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    state: dict[str, Any] = {}
    for index, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{index}"
        state[name] = chunk.sharded_state_dict(metadata=metadata)
    if optimizer is not None:
        models = {name: part for name, part in state.items() if name.startswith("model")}
        state["optimizer"] = optimizer.sharded_state_dict(
            models if len(chunks) > 1 else models["model"],
            is_loading=is_loading,
            metadata=metadata,
        )
    return state


def _read(folder: Path, sharded_state: dict[str, Any]) -> dict[str, Any]:
    source = folder / STATE_FOLDER
    refuse_code(source)
    try:
        state = dist_checkpointing.load(sharded_state, str(source))
    except _MISFITS as error:
        raise CheckpointError(
            f"{source} does not fit this model: {str(error)[:400]}; "
            "use the configuration it was trained with"
        ) from error
    assert isinstance(state, dict)  # pairs only come back under another strictness
    return state


def _load_chunks(state: dict[str, Any], *, chunks: list[Emu35Model]) -> None:
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{index}"])


def _is_zero1(optimizer: MegatronOptimizer) -> bool:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return any(isinstance(part, DistributedOptimizer) for part in parts)


def _count_from_zero(state: dict[str, Any], *, optimizer: MegatronOptimizer) -> None:
    """mcore writes no step count of zero, which is that of a run whose steps were all skipped so
    far, and torch's AdamW does not load without one."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if all(isinstance(part.optimizer, torch.optim.AdamW) for part in parts):
        state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step counter: torch's AdamW adds one to a parameter's counter
    at each update, and loading leaves one tensor shared by all of them."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).detach().clone().float()
