"""Linear maps with weights of eight bits, for generation: torchao's tensors in our layers.

==============  =================  ============  =============  ====================================
                weights            activations   product in     runs on
==============  =================  ============  =============  ====================================
int8_weights    int8               as they are   their type     any device
fp8_weights     float8 e4m3        as they are   their type     any device
fp8_dynamic     float8 e4m3        float8 e4m3   float8 e4m3    GPUs of compute capability >= 8.9
==============  =================  ============  =============  ====================================

Every output channel of a weight has a scale of its own, and with ``fp8_dynamic`` every token of the
activations, found as it passes. The two weight-only forms save memory and the time to read it; the
third takes the GPU's FP8 units as well. Without torch.compile torchao widens a weight-only weight
whole before each product, so on a CPU they cost time. The embedding, the output layer, the norms
and adapters (:mod:`emu35.model.lora`) stay as they are: quantised logits would move every choice.

torchao knows ``torch.nn.Linear``, and its tensors answer to ``torch.nn.functional.linear``;
megatron-core's linears are none and multiply in an autograd function of their own. So a weight is
quantised inside a Linear that stands in for ours, goes back as the parameter ``weight``, and the
layers of :mod:`emu35.model.lora` multiply with it by ``functional.linear``. What ranks exchange
stays megatron-core's.

The scale of an output channel is that of its whole row in any layout: where a weight is split by
columns, ranks put their parts together, one weight at a time, and keep their columns of the result.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from emu35.config import LMConfig, Precision
from emu35.errors import ConfigError, LaunchError
from emu35.model.lora import AdaptedLinear, RowLinear
from emu35.model.transformer import Emu35Model


class Quantization(StrEnum):
    """What the linear maps of the layers become."""

    int8_weights = "int8_weights"
    fp8_weights = "fp8_weights"
    fp8_dynamic = "fp8_dynamic"


_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply in FP8."""

_SMALLEST = 1e-12
"""Largest activation of a token below which all of them count as 0."""

_TILE = 16
"""What the sides of a weight are multiples of, for the FP8 product."""


def require_quantization(
    how: Quantization, *, config: LMConfig, precision: Precision, tp: int
) -> None:
    """Check that a model of ``config`` can be quantised here, before any of it is built.

    Raises:
        ConfigError: torchao is missing, or cannot take weights of this type or these sizes.
        LaunchError: this machine has no GPU that multiplies in FP8.
    """
    _torchao()
    if how is not Quantization.fp8_dynamic:
        return
    others = f"{Quantization.fp8_weights} and {Quantization.int8_weights} run anywhere"
    if not torch.cuda.is_available():
        raise LaunchError(f"quantize={how} needs a CUDA device; {others}")
    if (found := torch.cuda.get_device_capability()) < _CAPABILITY:
        raise LaunchError(
            f"quantize={how} needs a GPU of compute capability 8.9 or more, and this one has "
            f"{found[0]}.{found[1]}; {others}"
        )
    if precision is not Precision.bf16:
        raise ConfigError(
            f"quantize={how} takes activations of type bf16, and this model is to be loaded in "
            f"{precision}; add --precision bf16, or use {Quantization.fp8_weights}"
        )
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    sides = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size / tp": config.ffn_hidden_size // tp,
        "num_attention_heads * head_dim / tp": queries // tp,
        "(num_attention_heads + 2 * num_kv_heads) * head_dim / tp": (queries + 2 * keys) // tp,
    }
    if odd := [f"{name} is {side}" for name, side in sides.items() if side % _TILE]:
        raise ConfigError(
            f"quantize={how} multiplies in tiles of {_TILE}, but {', '.join(odd)}; "
            f"use {Quantization.fp8_weights}"
        )


@torch.no_grad()
def quantize_linears(model: Emu35Model, *, how: Quantization) -> None:
    """Quantise the weights of the layers' linear maps in ``model`` (this rank's part of it, of
    local layers, filled). Collective where the model is split. It can be neither trained nor saved
    nor filled again.

    Raises:
        ConfigError: torchao is missing.
    """
    torchao = _torchao()
    for linear in quantizable(model).values():
        split = isinstance(linear, RowLinear) and dist.get_world_size(linear.tp_group) > 1
        weight_OI: torch.Tensor = _whole_columns(linear) if split else linear.weight.detach()
        linear.weight = None  # type: ignore[assignment]  # frees what was gathered
        stand_in = torch.nn.Linear(1, 1, bias=False, device="meta")
        stand_in.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
        torchao.quantize_(stand_in, _recipe(how))
        quantized_OI: Any = stand_in.weight
        assert type(quantized_OI) is not torch.nn.Parameter, f"{weight_OI.shape} was passed over"
        if how is not Quantization.int8_weights:
            _mend_zero_rows(quantized_OI, zero_O=(weight_OI == 0).all(dim=1))
        if split:
            quantized_OI = _own_columns(quantized_OI, linear=linear)
        linear.weight = torch.nn.Parameter(quantized_OI, requires_grad=False)
        linear.quantized = True


def quantizable(model: Emu35Model) -> dict[str, AdaptedLinear]:
    """The linear maps that are quantised, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }


def weight_bytes(model: Emu35Model) -> int:
    """Memory of the parameters on this rank, scales of quantised ones included."""
    return sum(part.nbytes for weight in model.parameters() for part in _parts(weight))


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a subclass keeps its numbers in."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from _parts(getattr(tensor, name))


def _whole_columns(linear: AdaptedLinear) -> torch.Tensor:
    part_OI = linear.weight.detach().contiguous()
    parts = [torch.empty_like(part_OI) for _ in range(dist.get_world_size(linear.tp_group))]
    dist.all_gather(parts, part_OI, group=linear.tp_group)
    return torch.cat(parts, dim=1)


def _own_columns(whole_OI: torch.Tensor, *, linear: AdaptedLinear) -> torch.Tensor:
    columns = whole_OI.shape[1] // dist.get_world_size(linear.tp_group)
    start = columns * dist.get_rank(linear.tp_group)
    # A copy: the columns alone would keep the whole alive.
    return whole_OI[:, start : start + columns].clone(memory_format=torch.contiguous_format)


def _mend_zero_rows(quantized_OI: Any, *, zero_O: torch.Tensor) -> None:
    """A channel of zeros has the scale 0, by which torchao divides them into NaN."""
    quantized_OI.qdata.view(torch.uint8)[zero_O] = 0
    quantized_OI.scale[zero_O] = 1


def _recipe(how: Quantization) -> object:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    # The rest of torchao's defaults change settings of torch.compile for the whole process.
    match how:
        case Quantization.int8_weights:
            return Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
        case Quantization.fp8_weights:
            return Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
        case Quantization.fp8_dynamic:
            return Float8DynamicActivationFloat8WeightConfig(
                granularity=PerRow(),
                # A token whose activations are all 0 (PAD's are) would come out as NaN.
                activation_value_lb=_SMALLEST,
                set_inductor_config=False,
            )


def _torchao() -> ModuleType:
    try:
        with _without_warnings():
            import torchao
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise
        raise ConfigError(
            "quantize needs the package torchao; install it with pip install 'emu35[quantize]'"
        ) from error
    return torchao


@contextmanager
def _without_warnings() -> Iterator[None]:
    """torchao warns of kernels for formats that are not used here when they do not load."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
