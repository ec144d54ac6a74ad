"""``emu35 serve --quantize``."""

from pathlib import Path

import pytest
import torch

from emu35.checkpoint.source import describe
from emu35.cli import main
from emu35.model.quantize import Quantization, quantizable, weight_bytes
from emu35.stages.serve.options import ServeOptions
from emu35.stages.serve.server import engine_maker


def test_a_server_may_have_quantised_weights(drawing_run: Path) -> None:
    how = Quantization.int8_weights
    described = describe(drawing_run)
    engines = [
        engine_maker(ServeOptions(source=drawing_run, quantize=each), described=described)()
        for each in (None, how)
    ]
    whole, small = (weight_bytes(engine.model) for engine in engines)
    layers = sum(linear.weight.numel() for linear in quantizable(engines[0].model).values())
    assert 2.5 * layers < whole - small < 3 * layers
    for engine in engines:
        engine.close()


def test_what_cannot_be_quantised_ends_the_command_at_once(
    drawing_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    call = ["serve", "--run", str(drawing_run), "--port", "0", "--quantize", "fp8_dynamic"]
    assert main(call) == 2
    assert "quantize=fp8_dynamic needs a CUDA device" in capsys.readouterr().err
