"""Process groups of megatron-core, one seed a rank, and the facts other packages ask for."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from emu35.config import ParallelConfig
from emu35.errors import ConfigError, LaunchError
from emu35.parallel import cpu
from emu35.parallel.device import local_device

cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

LATER = 4
"""How many timeouts a collective itself waits. The watchdog of training comes first: it can name
the rank that everybody waits for, and lets those wait whose peers still write or validate."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Mesh:
    """Where this rank stands. Ranks of one data-parallel index read the same samples; each
    context-parallel rank works on some of their tokens."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup


def init_mesh(parallel: ParallelConfig, *, seed: int, timeout: int = 600) -> Mesh:
    """Join the process group (from torchrun's environment, else alone) and lay out the ranks.

    Calling it again with another layout of the same world re-creates the groups.

    Raises:
        ConfigError: if the world does not divide into the layout.
        LaunchError: if the ranks cannot reach each other.
    """
    join_process_group(timeout=timeout)
    world = dist.get_world_size()
    if world % parallel.model_ranks:
        raise ConfigError(
            f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} = {parallel.model_ranks} "
            f"does not divide the {world} ranks started; start a multiple of "
            f"{parallel.model_ranks} ranks"
        )
    _forget_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=LATER * timeout // 60 + 1,
        # mcore would keep a second set of groups, over gloo, for checkpoints of its own.
        create_gloo_process_groups=False,
    )
    mesh = current_mesh()
    # Weights do not depend on this seed (see emu35.model.init), only dropout does: replicas and
    # parts of a sequence must differ, tensor-parallel ranks must agree outside mcore's tracker and
    # differ inside it.
    replica = mesh.dp_rank * mesh.cp_size + mesh.cp_rank
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + 100 * mesh.pp_rank + 1_000_003 * replica, force_reset_rng=True
    )
    return mesh


def single_process_mesh(*, seed: int = 0) -> Mesh:
    """A world of one rank, for tools that load a whole model in this process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise LaunchError(
            f"this tool works in one process, but {dist.get_world_size()} ranks were started; "
            "run it without torchrun"
        )
    if parallel_state.model_parallel_is_initialized() and current_mesh().tp_size == 1:
        return current_mesh()
    return init_mesh(ParallelConfig(), seed=seed)


def inference_mesh(*, tp: int) -> Mesh:
    """The mesh of a model in ``tp`` ranks; an equal one that is there already is kept.

    Raises:
        ConfigError: the world does not divide by ``tp``.
        LaunchError: several ranks were started for ``tp`` = 1, or they cannot reach each other.
    """
    if tp == 1:
        return single_process_mesh()
    if parallel_state.model_parallel_is_initialized():
        mesh = current_mesh()
        if (mesh.tp_size, mesh.pp_size, mesh.cp_size) == (tp, 1, 1):
            return mesh
    return init_mesh(ParallelConfig(tp=tp), seed=0)


def current_mesh() -> Mesh:
    """The mesh that ``init_mesh`` laid out."""
    return Mesh(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=local_device(),
        tp_group=_one(parallel_state.get_tensor_model_parallel_group()),
        pp_group=_one(parallel_state.get_pipeline_model_parallel_group()),
        cp_group=_one(parallel_state.get_context_parallel_group()),
        dp_group=_one(parallel_state.get_data_parallel_group()),
        dp_cp_group=_one(parallel_state.get_data_parallel_group(with_context_parallel=True)),
    )


def _one(group: object) -> dist.ProcessGroup:
    """mcore types its groups loosely, since other layouts of its own have several a rank."""
    assert isinstance(group, dist.ProcessGroup)
    return group


def join_process_group(*, timeout: int = 600) -> None:
    """Initialise torch.distributed once: NCCL with CUDA, gloo without; a world of one if alone."""
    if dist.is_initialized():
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=LATER * timeout + 60)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        try:
            dist.init_process_group(backend, timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(
                f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} could not join "
                f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '?')} ({error}); "
                "check that every rank was started and that the port is free"
            ) from error
        return
    # A HashStore needs no port, so any number of single-process runs can share a host.
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)


def _forget_layout() -> None:
    """End the groups of the layout before; left alone, each keeps threads that go on polling."""
    if not parallel_state.model_parallel_is_initialized():
        return
    # A rank that closes its connections must not be ahead of one that still reads from them.
    dist.barrier()
    groups: Any = parallel_state._global_process_group_list
    parallel_state.destroy_model_parallel()
    for group in dict.fromkeys(groups or []):
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def leave() -> None:
    """Destroy the groups; needed for a clean end of multi-rank processes."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
