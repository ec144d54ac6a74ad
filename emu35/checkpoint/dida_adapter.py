"""Adapters of noisy copies in a release: files of their own, beside weights that stay as they are.

::

    REL/dida_adapter/model.safetensors             the matrices, and their index
                     model.safetensors.index.json
                     adapter.json                  rank, alpha, dropout, targets, path of the noise

Merged into the weights they would change what is generated token by token, so nothing is merged:
whoever loads a release without looking in here gets the model that was adapted, bit for bit.

Tensors have the names that PEFT gives to adapters of the official layers, so that their shapes and
places can be read off: ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``. What is
one linear map here are several there (query, key and value; gate and up), which then have equal A
and their own rows of B. There is no ``adapter_config.json`` on purpose: PEFT would add these
matrices to every token, while they are meant for the noisy codes of a picture alone.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from emu35.checkpoint.hf import Shard, check_tensors
from emu35.checkpoint.hf_config import read_json
from emu35.checkpoint.release_folder import read_noise, write_json
from emu35.checkpoint.safetensor_files import SafetensorFolder, write_safetensors
from emu35.config import LMConfig, LoRAConfig, LoRATarget, PathConfig
from emu35.errors import CheckpointError, ReleaseError
from emu35.model.lora import LowRank, adapted_linears
from emu35.model.names import global_name
from emu35.model.shapes import hf_shapes
from emu35.model.transformer import Emu35Model

ADAPTER_FOLDER = "dida_adapter"
ADAPTER_JSON = "adapter.json"
FORMAT = 1

_PREFIX = "base_model.model."
_PARTS = {
    LoRATarget.linear_qkv: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    LoRATarget.linear_proj: ("self_attn.o_proj",),
    LoRATarget.linear_fc1: ("mlp.gate_proj", "mlp.up_proj"),
    LoRATarget.linear_fc2: ("mlp.down_proj",),
}
"""The official maps that one of ours is."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ReleasedAdapter:
    """What ``dida_adapter`` holds: how the adapters are built, the path from noise to pictures that
    they were trained on, and their tensors."""

    config: LoRAConfig
    noise: PathConfig
    weights: SafetensorFolder


def write_adapter(
    model: Emu35Model, *, config: LoRAConfig, noise: PathConfig, release: Path, dtype: torch.dtype
) -> None:
    """Write the adapters of ``model`` (a whole one) into the folder ``release``, as ``dtype``.

    Raises:
        ReleaseError: the disk is full or the folder cannot be written.
    """
    folder = release / ADAPTER_FOLDER
    folder.mkdir()
    write_safetensors(adapter_tensors(model), folder=folder, dtype=dtype)
    content = {"format": FORMAT, "noisy_only": True, **asdict(config), "noise": asdict(noise)}
    write_json(content, path=folder / ADAPTER_JSON)


def read_adapter(release: Path) -> ReleasedAdapter | None:
    """The adapters of the folder ``release``, their tensors not read yet; None where it has none.

    Raises:
        ReleaseError: they are damaged, of another format, or meant for more than noisy copies.
    """
    folder = release / ADAPTER_FOLDER
    if not folder.is_dir():
        return None
    path = folder / ADAPTER_JSON
    content = read_json(path)
    if content.get("format") != FORMAT or content.get("noisy_only") is not True:
        raise ReleaseError(
            f"{path} has format {content.get('format')!r} and noisy_only="
            f"{content.get('noisy_only')!r}; this version reads format {FORMAT} of adapters for "
            "noisy copies alone"
        )
    try:
        config = LoRAConfig(
            rank=int(content["rank"]),
            alpha=float(content["alpha"]),
            dropout=float(content["dropout"]),
            targets=[LoRATarget(name) for name in content["targets"]],
        )
        noise = read_noise(content["noise"])
        if noise is None:
            raise ValueError("noise is null")
        if problems := [*config.problems(), *noise.problems()]:
            raise ValueError("; ".join(problems))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"{path} lacks a field or has a wrong one: {error!r}") from None
    return ReleasedAdapter(config=config, noise=noise, weights=SafetensorFolder(folder))


def adapter_tensors(model: Emu35Model) -> dict[str, torch.Tensor]:
    """The adapters of ``model`` (a whole one) under PEFT's names, in the order of its layers."""
    found: dict[str, torch.Tensor] = {}
    for layer, target, adapter in _adapters(model):
        for part, b_OR in zip(
            _PARTS[target], _split(adapter.b, target=target, config=model.lm_config), strict=True
        ):
            found[_name(layer, part=part, matrix="A")] = adapter.a
            found[_name(layer, part=part, matrix="B")] = b_OR
    return found


def adapter_shapes(config: LMConfig, *, adapters: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that ``adapters`` of a model of ``config`` have."""
    whole = hf_shapes(config, vocabulary_size=1)
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        for target in adapters.targets:
            for part in _PARTS[target]:
                outputs, inputs = whole[f"model.layers.{layer}.{part}.weight"]
                found[_name(layer, part=part, matrix="A")] = (adapters.rank, inputs)
                found[_name(layer, part=part, matrix="B")] = (outputs, adapters.rank)
    return found


@torch.no_grad()
def fill_adapters(
    model: Emu35Model,
    *,
    state: SafetensorFolder,
    adapters: LoRAConfig,
    shard: Shard,
) -> None:
    """Copy tensors under PEFT's names into the adapters that ``model`` (a chunk, this rank's part
    of it) has.

    Raises:
        CheckpointError: names or shapes do not fit, or maps that are one here have different A.
        ReleaseError: a file is damaged.
    """
    config = model.lm_config
    expected = adapter_shapes(config, adapters=adapters)
    check_tensors(state, names=set(state), expected=expected, what=f"{state.folder}")
    for layer, target, adapter in _adapters(model):
        a, b = (
            [state[_name(layer, part=part, matrix=matrix)] for part in _PARTS[target]]
            for matrix in "AB"
        )
        if not all(torch.equal(each, a[0]) for each in a[1:]):
            raise CheckpointError(
                f"{state.folder}: layer {layer} has different lora_A for "
                f"{', '.join(_PARTS[target])}, which are one map here; only adapters that "
                "emu35 trained can be read"
            )
        whole_OR = _join(b, target=target, config=config, shard=shard)
        adapter.b.copy_(_own(whole_OR, like=adapter.b, dim=0, shard=shard))
        adapter.a.copy_(_own(a[0], like=adapter.a, dim=1, shard=shard))


def _adapters(model: Emu35Model) -> Iterator[tuple[int, LoRATarget, LowRank]]:
    for name, linear in adapted_linears(model).items():
        parts = global_name(model, name).split(".")
        assert linear.adapter is not None
        yield int(parts[2]), LoRATarget(parts[-1]), linear.adapter


def _name(layer: int, *, part: str, matrix: str) -> str:
    return f"{_PREFIX}model.layers.{layer}.{part}.lora_{matrix}.weight"


def _split(b_OR: torch.Tensor, *, target: LoRATarget, config: LMConfig) -> list[torch.Tensor]:
    """The rows of B by official map."""
    match target:
        case LoRATarget.linear_qkv:
            heads = config.num_attention_heads // config.num_kv_heads, 1, 1
            groups_GPR = b_OR.view(config.num_kv_heads, -1, b_OR.shape[-1])
            rows = [count * config.head_dim for count in heads]
            return [part.flatten(0, 1) for part in groups_GPR.split(rows, dim=1)]
        case LoRATarget.linear_fc1:
            return list(b_OR.chunk(2))
        case LoRATarget.linear_proj | LoRATarget.linear_fc2:
            return [b_OR]


def _join(
    parts: list[torch.Tensor], *, target: LoRATarget, config: LMConfig, shard: Shard
) -> torch.Tensor:
    """B again, in an order of which every rank's rows are a stretch."""
    match target:
        case LoRATarget.linear_qkv:
            groups = config.num_kv_heads
            return torch.cat([p.view(groups, -1, p.shape[-1]) for p in parts], dim=1).flatten(0, 1)
        case LoRATarget.linear_fc1:
            gates, ups = (part.chunk(shard.size) for part in parts)
            return torch.cat([half for pair in zip(gates, ups, strict=True) for half in pair])
        case LoRATarget.linear_proj | LoRATarget.linear_fc2:
            return parts[0]


def _own(whole: torch.Tensor, *, like: torch.Tensor, dim: int, shard: Shard) -> torch.Tensor:
    """This rank's part of a matrix that is split along ``dim``, or all of one that is not."""
    if whole.shape == like.shape:
        return whole
    size = like.shape[dim]
    return whole.narrow(dim, shard.rank * size, size)
