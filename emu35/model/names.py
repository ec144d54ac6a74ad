"""What a parameter of a chunk is called in the whole model, however that is laid out."""

import torch

from emu35.model.transformer import Emu35Model

FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Names of fused norms in a layer -> their names in a checkpoint, those of the local spec."""


def global_name(model: Emu35Model, name: str) -> str:
    """The parameter's name in an unpartitioned model: pipeline stages count their own layers."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(model.decoder.layers[int(parts[2])].layer_number) - 1)  # type: ignore[arg-type]
    return ".".join(parts)


def weights_by_name(model: Emu35Model) -> dict[str, torch.nn.Parameter]:
    """The parameters of a chunk under the names that they have in the unpartitioned model of local
    layers, whose norms are modules of their own. These are the names in a checkpoint, too."""
    return {
        _separate_norm(global_name(model, name)): parameter
        for name, parameter in model.named_parameters()
    }


def base_weights(model: Emu35Model) -> dict[str, torch.nn.Parameter]:
    """The parameters of a chunk without those of adapters, under its own names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.endswith((".adapter.a", ".adapter.b"))
    }


def _separate_norm(name: str) -> str:
    for fused, separate in FUSED_NORM_NAMES.items():
        name = name.replace(f".{fused}", f".{separate}")
    return name
