"""Model and optimizer through megatron-core's distributed checkpointing.

Every tensor is written under its name in the unpartitioned model with the place of each shard, so
that a checkpoint of one layout loads into another, whatever the optimizer
(:mod:`emu35.checkpoint.optimizer_state`).

A run with adapters keeps all weights, the frozen ones too, beside the adapters, so that it stands
alone: nothing of it lies in the run it started from. Its optimizer state is that of the adapters.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from emu35.checkpoint.agree import on_all_ranks
from emu35.checkpoint.optimizer_state import get_step, set_step, sharded_optimizer_state
from emu35.checkpoint.staged import StateWrite
from emu35.checkpoint.unpickle import refuse_code
from emu35.config import LoRAConfig
from emu35.errors import CheckpointError
from emu35.model.lora import adapters_to_merge, attach_adapters, without_adapters
from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu
from emu35.parallel.collectives import is_main

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
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
EXTRA_STATE = "_extra_state"
OPTIMIZER_FILE = "optimizer.json"
"""Present where the optimizer was saved: the number of updates it made."""


def save(folder: Path, *, chunks: list[Emu35Model], optimizer: MegatronOptimizer | None) -> None:
    """Write ``folder/state``; every rank calls it. Without an optimizer only weights are kept."""
    state = plan_save(folder, chunks=chunks, optimizer=optimizer)
    state.write()
    state.finish()


def plan_save(
    folder: Path, *, chunks: list[Emu35Model], optimizer: MegatronOptimizer | None
) -> StateWrite:
    """The beginning of :func:`save`: what is returned is still to be written."""
    target = folder / STATE_FOLDER

    def prepare() -> None:
        if is_main():
            target.mkdir()
            if optimizer is not None:
                content = json.dumps({"step": get_step(optimizer)})
                (folder / OPTIMIZER_FILE).write_text(content, encoding="utf-8")

    # Not left to the collective save below: it would wait for a rank 0 that failed here.
    on_all_ranks(prepare, blame=lambda why: f"cannot write into {folder}: {why}")
    return StateWrite(_sharded_state(chunks, optimizer=optimizer), folder=folder, name=STATE_FOLDER)


def load(folder: Path, *, chunks: list[Emu35Model], optimizer: MegatronOptimizer) -> None:
    """Restore weights and optimizer in place, in any layout, with ZeRO-1 or without.

    Raises:
        CheckpointError: if the folder does not fit this model, or holds no optimizer.
    """
    try:
        step = int(json.loads((folder / OPTIMIZER_FILE).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds weights but no optimizer state that this version reads, so training "
            "cannot be resumed from it; start a new run with stage.init_from naming its run folder"
        ) from None
    state = _read(folder, _sharded_state(chunks, optimizer=optimizer))
    _load_chunks(state, chunks=chunks)  # the optimizer's tensors were read in place
    set_step(optimizer, step)


def load_weights(
    folder: Path,
    *,
    chunks: list[Emu35Model],
    adapters: LoRAConfig | None = None,
    copy_adapters: LoRAConfig | None = None,
    stored: torch.dtype = torch.float32,
) -> None:
    """Restore weights alone, in any layout. Adapters that ``chunks`` have themselves stay as they
    are.

    Args:
        folder: of a checkpoint.
        chunks: this rank's model.
        adapters: those that the checkpoint holds beside the weights; they are merged into them,
            in fp32 and rounded once.
        copy_adapters: those of noisy copies, which are put beside the weights and stay there;
            ``chunks`` have none of their own then.
        stored: type of the adapters and weights in the checkpoint, or a wider one.

    Raises:
        CheckpointError: if the folder does not fit this model.
        ConfigError: ``chunks`` are of layers that adapters cannot be read into.
    """
    with ExitStack() as aside:
        for chunk in chunks:
            if copy_adapters is not None:
                attach_adapters(chunk, config=copy_adapters, noisy_only=True)
                continue
            aside.enter_context(without_adapters(chunk))
            if adapters is not None:
                aside.enter_context(adapters_to_merge(chunk, config=adapters, stored=stored))
        state = _read(folder, _sharded_state(chunks, optimizer=None))
        _load_chunks(state, chunks=chunks)


def _sharded_state(
    chunks: list[Emu35Model], *, optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    # The keys here are this rank's own: the files know only the tensors' names in the whole model.
    state: dict[str, Any] = {
        _chunk_name(index): _tensors_alone(chunk.sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(optimizer, model_state=dict(state))
    return state


def _tensors_alone(state: dict[str, Any]) -> dict[str, Any]:
    """Without the extra state of transformer-engine's modules: pickles that it would run when they
    are loaded, which local layers neither have nor want. FP8's delayed scaling, whose history they
    are, starts anew after a resume."""
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


def _chunk_name(index: int) -> str:
    return f"model{index}"


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
        found = chunk.load_state_dict(state[_chunk_name(index)], strict=False)
        misfits = [*found.missing_keys, *found.unexpected_keys]
        assert all(name.endswith(EXTRA_STATE) for name in misfits), misfits
