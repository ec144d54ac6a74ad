"""AdamW's state as tensors of the unpartitioned model, whichever optimizer holds it.

megatron-core writes one form for its plain optimizers and another for ZeRO-1, which gathers every
buffer onto every rank first. Here both are written alike: for each parameter ``NAME`` the tensors
``optimizer.state.exp_avg.NAME``, ``optimizer.state.exp_avg_sq.NAME`` and, where the parameter
itself is not fp32, ``optimizer.state.fp32_param.NAME``, all of the shape of the whole parameter.

ZeRO-1 cuts the flattened parameters anywhere. A range of a flattened tensor is a few boxes of the
tensor (the rest of a row, whole rows, the beginning of a row), and boxes are what torch's
checkpoints consist of; so each rank writes and reads exactly what it owns, without any exchange,
and what one layout wrote, any other reads. Reading goes straight into the optimizer's own tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from emu35.parallel import cpu

cpu.install()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import (  # noqa: E402
    extract_sharded_tensors_and_factories,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402

PREFIX = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"


@dataclass(kw_only=True, slots=True, frozen=True)
class _Piece:
    """Elements ``begin`` to ``end`` of a flattened model parameter of this rank, and the tensors
    (by name) that hold their optimizer state. ``shared``: every data-parallel rank has them."""

    parameter: torch.Tensor
    begin: int
    end: int
    tensors: dict[str, torch.Tensor]
    shared: bool


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, *, model_state: ShardedStateDict
) -> dict[str, ShardedTensor]:
    """The state of this rank, each tensor with its place in the whole; to be written, or to be
    read into (the tensors are views). Moments that do not exist yet are made, as zeros.

    Args:
        model_state: the sharded state of all of this rank's chunks.
    """
    _complete(optimizer)
    sharded_parts, _ = extract_sharded_tensors_and_factories(model_state)
    places = {id(part.data): part for part in nested_values(sharded_parts)}
    state: dict[str, ShardedTensor] = {}
    for piece in _pieces(optimizer):
        for tensor in _sharded(piece, place=places[id(piece.parameter)]):
            where = ".".join(map(str, tensor.global_offset))
            state[f"{tensor.key}@{where}"] = tensor
    return state


def get_step(optimizer: MegatronOptimizer) -> int:
    """Updates made, the same for every parameter."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                return int(state["step"]) if "step" in state else int(group.get("step", 0))
    return 0


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Make ``step`` the number of updates of every parameter.

    torch's AdamW counts in a tensor a parameter and adds one to it at each update, so no two may
    share theirs; the fused optimizers of CUDA count once a group.
    """
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.Adam):
                group["step"] = step
                continue
            for parameter in group["params"]:
                on_device = group.get("fused") or group.get("capturable")
                device = parameter.device if on_device else torch.device("cpu")
                counter = torch.tensor(float(step), dtype=torch.float32, device=device)
                part.optimizer.state[parameter]["step"] = counter


def boxes(
    shape: tuple[int, ...], *, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``begin`` to ``end`` of a flattened tensor as (offsets, sizes) of boxes, in order.

    At most ``2 * len(shape) - 1`` boxes.
    """
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(shape[1:])
    first, rest = divmod(begin, row)
    if rest or end < begin + row:
        upper = min(end, (first + 1) * row)
        for offsets, sizes in boxes(shape[1:], begin=rest, end=upper - first * row):
            yield (first, *offsets), (1, *sizes)
        yield from boxes(shape, begin=upper, end=end)
        return
    rows = (end - begin) // row
    yield (first, *[0] * (len(shape) - 1)), (rows, *shape[1:])
    yield from boxes(shape, begin=begin + rows * row, end=end)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _complete(optimizer: MegatronOptimizer) -> None:
    """Before the first update there are neither moments nor counters."""
    step = get_step(optimizer)
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    set_step(optimizer, step)


def _pieces(optimizer: MegatronOptimizer) -> Iterator[_Piece]:
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            yield from _zero1_pieces(part)
            continue
        models = {
            id(main): model
            for models, mains in zip(
                getattr(part, "float16_groups", []),
                getattr(part, "fp32_from_float16_groups", []),
                strict=True,
            )
            for model, main in zip(models, mains, strict=True)
        }
        for main in part.get_parameters():
            model = models.get(id(main), main)
            yield _Piece(
                parameter=model,
                begin=0,
                end=model.numel(),
                tensors=_tensors(part, main=main, model=model),
                shared=True,
            )


def _zero1_pieces(part: DistributedOptimizer) -> Iterator[_Piece]:
    for model, (group, order) in part.model_param_group_index_map.items():
        span = part._get_model_param_range_map(model)["param"]
        main = part.optimizer.param_groups[group]["params"][order]
        yield _Piece(
            parameter=model,
            begin=span.start,
            end=span.end,
            tensors=_tensors(part, main=main, model=model),
            shared=False,
        )


def _tensors(
    part: MegatronOptimizer, *, main: torch.Tensor, model: torch.Tensor
) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    tensors = {name: state[name] for name in MOMENTS}
    if model.dtype is not torch.float32:
        tensors[MASTER] = main.detach()
    return tensors


def _sharded(
    piece: _Piece, *, place: ShardedTensor | ShardedTensorFactory
) -> Iterator[ShardedTensor]:
    """The piece cut at the seams of what the parameter is written as (gate and up of the first
    feed-forward matrix are two tensors side by side) and into boxes."""
    replica = place.replica_id
    assert isinstance(replica, tuple)
    if not piece.shared:  # the one data-parallel rank that has it writes it
        replica = (*replica[:2], 0)
    built: Any = place.build() if isinstance(place, ShardedTensorFactory) else [place]
    stored: list[ShardedTensor] = built
    start = 0
    for whole in stored:
        assert whole.data is not None
        assert whole.data.is_contiguous()
        size = whole.data.numel()
        begin, end = max(piece.begin, start), min(piece.end, start + size)
        for offsets, sizes in boxes(tuple(whole.data.shape), begin=begin - start, end=end - start):
            count = math.prod(sizes)
            ahead = whole.global_offset[: whole.prepend_axis_num]
            inside = whole.global_offset[whole.prepend_axis_num :]
            for name, tensor in piece.tensors.items():
                flat = tensor.detach().view(-1)[begin - piece.begin :][:count]
                yield replace(
                    whole,
                    key=f"{PREFIX}.{name}.{whole.key}",
                    data=flat.view((1,) * len(ahead) + sizes),
                    dtype=tensor.dtype,
                    local_shape=(1,) * len(ahead) + sizes,
                    global_offset=(*ahead, *(a + b for a, b in zip(inside, offsets, strict=True))),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                    replica_id=replica,
                )
            begin += count
        start += size
    assert start == piece.parameter.numel()
