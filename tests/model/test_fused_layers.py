"""Fused layers keep the names of the local ones, so that checkpoints of both are one.

transformer-engine exists for CUDA only; a stand-in with its module and parameter names takes its
place here, and the GPU tests use the real one.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_lm
from torch.distributed.checkpoint.filesystem import FileSystemReader

from emu35.checkpoint import sharded
from emu35.checkpoint.hf import to_hf
from emu35.checkpoint.source import fill
from emu35.config import EngineConfig, LayerSpec
from emu35.errors import LaunchError
from emu35.model import spec
from emu35.model.build import build_model
from emu35.model.context import AttentionContext
from emu35.model.init import initialize
from emu35.model.mask import AttentionMask
from emu35.model.names import weights_by_name
from emu35.model.norm import RMSNorm, rms_norm
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh

MODEL = tiny_lm()


class FusedNormLinear(spec.ColumnParallelLinear):
    """A norm and the projection behind it under the names of ``te.LayerNormLinear``, with the extra
    state that it puts into every state_dict."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon

    def forward(self, hidden: torch.Tensor, **options: Any) -> Any:  # type: ignore[override]
        normed = rms_norm(hidden, weight_H=self.layer_norm_weight, eps=self.eps)
        return super().forward(normed, **options)

    def get_extra_state(self) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros(4, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        del state


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = SimpleNamespace(
        TENorm=RMSNorm,
        TERowParallelLinear=spec.RowParallelLinear,
        TELayerNormColumnParallelLinear=FusedNormLinear,
    )
    monkeypatch.setattr(spec, "_transformer_engine", lambda: modules)


def build(layers: LayerSpec, *, seed: int) -> Emu35Model:
    single_process_mesh()
    model = build_model(MODEL, vocabulary_size=101, engine=EngineConfig(layers=layers))
    initialize(model, seed=seed, pad_id=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of ones could be exchanged unnoticed
                parameter += 0.1 * torch.rand(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    return model


def hidden_of(model: Emu35Model) -> torch.Tensor:
    tokens_BS = torch.arange(1, 13)[None]
    context = AttentionContext(
        positions_BS=torch.arange(12)[None],
        mask=AttentionMask.causal(torch.zeros(1, 12, dtype=torch.int64)),
    )
    with torch.no_grad():
        return model.eval()(tokens_BS, context=context)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("saved", list(LayerSpec))
def test_each_loads_the_checkpoint_of_the_other(saved: LayerSpec, tmp_path: Path) -> None:
    (other,) = set(LayerSpec) - {saved}
    writer, reader = build(saved, seed=1), build(other, seed=2)
    assert not torch.equal(hidden_of(writer), hidden_of(reader))
    sharded.save(tmp_path, chunks=[writer], optimizer=None)
    kept = FileSystemReader(tmp_path / sharded.STATE_FOLDER).read_metadata().state_dict_metadata
    assert not [name for name in kept if "extra_state" in name or "layer_norm" in name]
    sharded.load_weights(tmp_path, chunks=[reader])
    assert torch.equal(hidden_of(writer), hidden_of(reader))


@pytest.mark.usefixtures("stand_in")
def test_a_release_fills_them() -> None:
    local, fused = build(LayerSpec.local, seed=1), build(LayerSpec.te, seed=2)
    release = to_hf(dict(local.named_parameters()), config=MODEL, vocabulary_size=101)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.fill_(torch.nan)
    fill(fused, state=release)
    assert torch.equal(hidden_of(local), hidden_of(fused))
    assert weights_by_name(fused).keys() == dict(local.named_parameters()).keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
def test_fused_layers_without_a_gpu_are_refused() -> None:
    single_process_mesh()
    with pytest.raises(LaunchError, match="layers=te needs a CUDA device"):
        build_model(MODEL, vocabulary_size=101, engine=EngineConfig(layers=LayerSpec.te))
