"""A state that is planned together, written by each rank alone, and listed together.

megatron-core's own writer spawns a manager process and forks workers at every save, even a
synchronous one: seconds of overhead, a deadlock with gloo's threads, and children that outlive a
killed trainer. Here megatron-core plans who writes what, and torch's file writer carries it out in
this process. The files are the same and so is the reader.

The three parts are apart so that the middle one, which takes the time, can run on a thread while
the next steps are made: it exchanges nothing with other ranks and reads only this rank's tensors,
or, after :meth:`StateWrite.stage`, copies of them that no step changes.
"""

import io
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from emu35.parallel import cpu

cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedStateDict  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class StagedWrite(Protocol):
    """What a save leaves to be written. ``stage`` and ``finish`` are called on every rank, on the
    main thread; ``write`` perhaps on another thread, and then after ``stage``."""

    def stage(self) -> None:
        """Copy what is still to be written, so that training may go on."""
        ...

    def write(self) -> list[str]:
        """Write this rank's files; their names below the checkpoint's folder. No collectives."""
        ...

    def finish(self) -> None:
        """What must follow once every rank has written. Collective."""
        ...


class StateWrite:
    """A sharded state on its way into ``folder / name``. Making it plans the write. Collective.

    Args:
        state: nested dictionaries of megatron-core's sharded tensors (and plain values).
        folder: the checkpoint.
        name: an existing empty folder inside it.
    """

    def __init__(self, state: dict[str, Any], *, folder: Path, name: str) -> None:
        planner = _PlanOnly()
        dist_checkpointing.save(state, str(folder / name), sharded_strategy=planner)
        self._name = name
        self._writer, self._data, self._plan = planner.writer, planner.data, planner.plan
        self._metadata, self._ranks = planner.metadata, planner.ranks
        self._results: list[WriteResult] = []

    def stage(self) -> None:
        """Copy this rank's tensors into the memory of the host."""
        self._data.copy(self._plan)

    def write(self) -> list[str]:
        """Write this rank's tensors.

        Raises:
            OSError, RuntimeError: the files cannot be written.
        """
        future = self._writer.write_data(self._plan, self._data)
        future.wait()
        self._results = future.value()
        self._data.forget()
        return sorted(
            {f"{self._name}/{found.storage_data.relative_path}" for found in self._results}
        )

    def finish(self) -> None:
        """Write the table of contents on rank 0."""

        def write_contents(results: list[list[WriteResult]]) -> None:
            assert self._metadata is not None
            self._writer.finish(self._metadata, results)

        self._ranks.all_reduce("write", lambda: self._results, write_contents)


class _Data(MCoreSavePlanner):
    """The tensors behind a plan: the live ones, or copies once they were made."""

    def __init__(self) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] | None = None

    def copy(self, plan: SavePlan) -> None:
        copies: dict[MetadataIndex, torch.Tensor | io.BytesIO] = {}
        for item in plan.items:
            value = super().resolve_data(item)
            if isinstance(value, torch.Tensor):
                value = value.detach().to("cpu", copy=True)
            copies[item.index] = value
        self._copies = copies
        self.state_dict = {}

    def forget(self) -> None:
        self._copies, self.state_dict = {}, {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self._copies is not None:
            return self._copies[write_item.index]
        return super().resolve_data(write_item)


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Stands where megatron-core expects a writer, and only plans."""

    writer: FileSystemWriter
    data: _Data
    plan: SavePlan
    ranks: _DistWrapper
    metadata: Metadata | None = None

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.writer = FileSystemWriter(checkpoint_dir, sync_files=False)
        self.data = _Data()
        self.ranks = _DistWrapper(None, True, 0)

        def plan_here() -> SavePlan:
            self.data.set_up_planner(
                mcore_to_pyt_state_dict(flat, False),
                storage_meta=self.writer.storage_meta(),
                is_coordinator=self.ranks.is_coordinator,
            )
            self.writer.set_up_storage_writer(self.ranks.is_coordinator)
            return self.writer.prepare_local_plan(self.data.create_local_plan())

        def plan_together(plans: list[SavePlan]) -> list[SavePlan]:
            together, self.metadata = self.data.create_global_plan(plans)
            return self.writer.prepare_global_plan(together)

        plan = self.ranks.reduce_scatter("plan", plan_here, plan_together)
        self.plan = self.data.finish_plan(plan)
