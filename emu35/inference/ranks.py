"""Tensor-parallel generation: every rank runs the same engine, and the first one decides.

All ranks schedule alike, because they are told the same things in the same order, and they hold
equal logits. Tokens are nevertheless drawn by one rank and handed to the others: a last bit that
differs between two devices must not send them down different roads.
"""

import torch
import torch.distributed as dist

from emu35.inference.request import Token
from emu35.parallel.mesh import current_mesh


def agree_on(tokens: list[Token]) -> list[Token]:
    """The tokens that the first rank of this tensor-parallel group chose."""
    mesh = current_mesh()
    if mesh.tp_size == 1:
        return tokens
    shared = [tokens]
    dist.broadcast_object_list(
        shared, src=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group
    )
    return shared[0]


def agree_on_tensor(values: torch.Tensor) -> torch.Tensor:
    """``values`` as the first rank of this tensor-parallel group has them, on all in place."""
    mesh = current_mesh()
    if mesh.tp_size > 1:
        dist.broadcast(values, src=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return values


def agree_on_least(number: int) -> int:
    """The smallest ``number`` of the ranks of this tensor-parallel group. Collective."""
    mesh = current_mesh()
    if mesh.tp_size == 1:
        return number
    least = torch.tensor([number], dtype=torch.int64, device=mesh.device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=mesh.tp_group)
    return int(least.item())
