"""Low-rank adapters beside the frozen weights of a layer's linear maps (arXiv 2106.09685).

An adapter adds ``scale * B A dropout(x)`` to ``W x``, with ``scale = alpha / rank``. It lies in the
slot ``adapter`` that every linear map of the local layers has, so the base weights keep their names
whether one is there or not: in checkpoints, in releases and where weights are filled in.

Over tensor-parallel ranks the small matrices follow the large one. Beside a column-parallel W, A is
whole on every rank and B has W's rows; beside a row-parallel one, A has W's columns and B is whole.
What crosses ranks is never wider than ``rank``:

==========  ===========  =======================================================================
W           ranks share  A x between A and B
==========  ===========  =======================================================================
by column   x            copied: the gradient of A x is the sum over ranks
by column   (sp) slices  gathered from the slices; its gradient is summed and dealt out again
by row      nothing      summed over ranks
by row      (sp) slices  summed, and each rank keeps its slice
==========  ===========  =======================================================================

Under sequence parallelism the matrix that is whole meets only this rank's slice of the tokens, so
its gradient is a part of the whole one: it is marked ``sequence_parallel``, as norms are, and
megatron-core adds those gradients up.

With ``noisy_only`` an adapter adds to some rows of tokens alone (``rows_SB1``, which the layer is
told with its context, see :class:`~emu35.model.layer.Layer`), and every other row comes out with
the base's own bits.

B starts as zero, so that training starts from the base exactly; A is N(0, 1 / (3 inputs)), the
variance of the paper's own code, drawn alike in every layout.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from emu35.config import LoRAConfig, LoRATarget
from emu35.errors import ConfigError
from emu35.model.names import global_name
from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu
from emu35.parallel.mesh import current_mesh

cpu.install()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class LowRank(torch.nn.Module, ABC):
    """The matrices ``a`` [R, I] and ``b`` [O, R] beside one weight [O, I], or this rank's part of
    them, in the weight's type and place. The subclasses say what ranks exchange between the two."""

    split_name: str
    """Which of the two is split over tensor-parallel ranks, along dimension ``split_dim``."""
    split_dim: int

    def __init__(self, linear: Any, *, config: LoRAConfig, noisy_only: bool = False) -> None:
        super().__init__()
        self.noisy_only = noisy_only
        outputs, inputs = linear.weight.shape
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.sequence_parallel: bool = linear.config.sequence_parallel
        self.group = linear.tp_group
        self.a = torch.nn.Parameter(linear.weight.new_zeros(config.rank, inputs))
        self.b = torch.nn.Parameter(linear.weight.new_zeros(outputs, config.rank))
        for name, parameter in self.named_parameters():
            if name == self.split_name:
                set_tensor_model_parallel_attributes(parameter, True, dim=self.split_dim, stride=1)
            else:
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, x_SBI: torch.Tensor, *, base_SBO: torch.Tensor, rows_SB1: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The linear map's input and output as this rank holds them -> the output with the
        addition, [S, B, O]; with ``noisy_only`` in ``rows_SB1`` (bool, all rows; None: in none)
        alone."""
        if self.noisy_only and rows_SB1 is None:
            return base_SBO
        if self.dropout > 0 and self.training:
            x_SBI = self._drop(x_SBI)
        lowered_SBR = self._exchange(F.linear(x_SBI, self.a)) * self.scale
        sum_NO = torch.addmm(base_SBO.flatten(0, 1), lowered_SBR.flatten(0, 1), self.b.t())
        if not self.noisy_only:
            return sum_NO.view_as(base_SBO)
        assert rows_SB1 is not None
        rows_N1 = self._rows_here(rows_SB1).flatten(0, 1)
        # Chosen, not multiplied by 0: x + 0 is not x where x is -0. Chosen as a matrix: strides of
        # another kind would send the next product another way, with other bits.
        return torch.where(rows_N1, sum_NO, base_SBO.flatten(0, 1)).view_as(base_SBO)

    def _rows_here(self, rows_SB1: torch.Tensor) -> torch.Tensor:
        """Those that the output on this rank has."""
        return rows_SB1

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Any, metadata: Any, *, halves: bool
    ) -> dict[str, Any]:
        """Both matrices with their places in the whole model. ``halves``: the rows of ``b`` are
        this rank's part of the gate above its part of the up projection."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {self.split_name: self.split_dim},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if halves:
            state[f"{prefix}b"] = apply_swiglu_sharded_factory(state[f"{prefix}b"], sharded_offsets)
        return state

    @abstractmethod
    def _exchange(self, lowered_SBR: torch.Tensor) -> torch.Tensor:
        """A x of this rank's part -> that of the output's rows."""

    def _drop(self, x_SBI: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_SBI, self.dropout)


class ColumnLowRank(LowRank):
    """Beside a weight whose rows are split over ranks."""

    split_name, split_dim = "b", 0

    def _exchange(self, lowered_SBR: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(
                lowered_SBR, tensor_parallel_output_grad=True, group=self.group
            )
        return tensor_parallel.copy_to_tensor_model_parallel_region(lowered_SBR, group=self.group)


class RowLowRank(LowRank):
    """Beside a weight whose columns are split over ranks."""

    split_name, split_dim = "a", 1

    def _exchange(self, lowered_SBR: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                lowered_SBR, group=self.group
            )
        return tensor_parallel.reduce_from_tensor_model_parallel_region(
            lowered_SBR, group=self.group
        )

    def _rows_here(self, rows_SB1: torch.Tensor) -> torch.Tensor:
        if not self.sequence_parallel:
            return rows_SB1
        return rows_SB1.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)]

    def _drop(self, x_SBI: torch.Tensor) -> torch.Tensor:
        """Ranks hold different columns, so each draws its own; under sequence parallelism
        mcore's block has switched to such a generator already."""
        if self.sequence_parallel:
            return F.dropout(x_SBI, self.dropout)
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        with tracker.fork():
            return F.dropout(x_SBI, self.dropout)


class AdaptedLinear(torch.nn.Module):
    """Goes before one of mcore's linear maps, which it gives a place for an adapter."""

    beside: type[LowRank]
    """The adapter that fits the map."""
    adapter: LowRank | None
    target: LoRATarget | None = None
    weight: torch.nn.Parameter
    rows_SB1: torch.Tensor | None = None
    """What the layer was told last: the rows that an adapter of noisy copies adds to."""
    quantized: bool = False
    """Whether the weight is a tensor of :mod:`emu35.model.quantize`."""
    tp_group: dist.ProcessGroup

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """mcore's output, with the adapter's addition if there is one, and mcore's bias."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.adapter is not None:
            output = self.adapter(input_, base_SBO=output, rows_SB1=self.rows_SB1)
        return output, bias

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """mcore's product; its autograd function knows no quantised weight."""
        if self.quantized:
            return F.linear(input, weight)
        return super()._forward_impl(  # type: ignore[misc]
            input, weight, *args, **kwargs
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """mcore's entries; the adapter's are its own, as mcore takes every matrix but the weight
        for unsplit."""
        state = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        if self.adapter is None:
            return state
        return state | self.adapter.sharded_state_dict(
            f"{prefix}adapter.",
            sharded_offsets,
            metadata,
            halves=self.target is LoRATarget.linear_fc1,
        )


class ColumnLinear(AdaptedLinear, ColumnParallelLinear):  # type: ignore[misc]
    """mcore's, with a place for an adapter."""

    beside = ColumnLowRank


class RowLinear(AdaptedLinear, RowParallelLinear):  # type: ignore[misc]
    """mcore's, with a place for an adapter."""

    beside = RowLowRank


def train_adapters(
    model: Emu35Model, *, config: LoRAConfig, seed: int, noisy_only: bool = False
) -> None:
    """Put fresh adapters into ``model`` (a chunk) and freeze everything else.

    Raises:
        ConfigError: as :func:`attach_adapters`.
    """
    model.requires_grad_(False)
    attach_adapters(model, config=config, noisy_only=noisy_only)
    _initialize(model, seed=seed)


def attach_adapters(model: Emu35Model, *, config: LoRAConfig, noisy_only: bool = False) -> None:
    """Put adapters that are zero into ``model`` (a chunk), which must have none.

    Raises:
        ConfigError: the layers are transformer-engine's, which have no place for one.
    """
    for name, linear in _targets(model, config=config).items():
        if not isinstance(linear, AdaptedLinear):
            raise ConfigError(
                [
                    f"{name} is a layer of transformer-engine, which has no place for an adapter; "
                    "use engine.layers=local, or export the adapted run first and start from that "
                    "release"
                ]
            )
        assert linear.adapter is None, name
        linear.target = LoRATarget(name.rsplit(".", 1)[-1])
        linear.adapter = linear.beside(linear, config=config, noisy_only=noisy_only)


@contextmanager
def adapters_to_merge(
    model: Emu35Model, *, config: LoRAConfig, stored: torch.dtype
) -> Iterator[None]:
    """Adapters of ``config`` in ``model`` (a chunk) for as long as the context lasts, to be filled
    together with their weights; merged at its end. Until then the weights beside them have the type
    ``stored`` where that is wider than their own, so that nothing is rounded before it is added.

    Raises:
        ConfigError: as :func:`attach_adapters`.
    """
    narrow: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    for linear in _targets(model, config=config).values():
        weight: Any = linear.weight
        if (wide := torch.promote_types(weight.dtype, stored)) != weight.dtype:
            narrow.append((weight, weight.data))
            weight.data = weight.data.to(wide)
    try:
        attach_adapters(model, config=config)
        yield
        merge_adapters(model)
    finally:
        for weight, place in narrow:  # not a new tensor: it may lie in a buffer of all parameters
            weight.data = place.copy_(weight.data)


@torch.no_grad()
def merge_adapters(model: Emu35Model) -> None:
    """Add every adapter to its weight, W + scale B A, computed in fp32 from the three as they are
    here and rounded once to the weight's type, and remove it. Needs no exchange: a rank's parts of
    B and A make its part of their product."""
    for linear in adapted_linears(model).values():
        adapter = linear.adapter
        assert adapter is not None
        addition = (adapter.b.float() @ adapter.a.float()).mul_(adapter.scale)
        linear.weight.copy_(addition.add_(linear.weight))
        linear.adapter = None


@contextmanager
def without_adapters(model: Emu35Model) -> Iterator[None]:
    """The base of ``model`` alone, for as long as the context lasts."""
    linears = adapted_linears(model)
    kept = {name: linear.adapter for name, linear in linears.items()}
    for linear in linears.values():
        linear.adapter = None
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.adapter = kept[name]


def adapted_linears(model: Emu35Model) -> dict[str, AdaptedLinear]:
    """The linear maps that have an adapter, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and module.adapter is not None
    }


def _targets(model: Emu35Model, *, config: LoRAConfig) -> Mapping[str, torch.nn.Module]:
    wanted = set(config.targets)
    return {n: module for n, module in model.named_modules() if n.rsplit(".", 1)[-1] in wanted}


@torch.no_grad()
def _initialize(model: Emu35Model, *, seed: int) -> None:
    """Draw every A as a whole, from (seed, name in the unpartitioned model), and keep this rank's
    part."""
    mesh = current_mesh()
    for name, linear in adapted_linears(model).items():
        assert linear.adapter is not None
        a_RI = linear.adapter.a
        rank, inputs = a_RI.shape
        split = linear.adapter.split_name == "a"
        total = inputs * mesh.tp_size if split else inputs
        start = inputs * mesh.tp_rank if split else 0
        whole = f"{seed}/{global_name(model, f'{name}.adapter.a')}"
        digest = hashlib.sha256(whole.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.randn(rank, total, generator=generator) * (3 * total) ** -0.5
        a_RI.copy_(drawn[:, start : start + inputs])
