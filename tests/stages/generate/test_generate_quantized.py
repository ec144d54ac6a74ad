"""``emu35 generate --quantize``: both decoders, and what is refused before a weight is read."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_source import options, rows, write_run

from emu35.checkpoint.source import describe, load_model
from emu35.cli import main
from emu35.config import Adapter, DiDAConfig, LoRAConfig, PathConfig, PathKind, Precision
from emu35.errors import LaunchError
from emu35.inference.request import Decoder
from emu35.model.quantize import Quantization, weight_bytes
from emu35.stages.generate.run import generate

UNIFORM = PathConfig(kind=PathKind.mixture_uniform)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters of noisy copies."""
    stage = DiDAConfig(
        path=UNIFORM,
        responses_only=False,
        adapter=Adapter.lora_noisy_only,
        lora=LoRAConfig(rank=4, alpha=8.0),
    )
    return write_run(tmp_path_factory.mktemp("adapted"), stage=stage)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without adapters."""
    stage = DiDAConfig(path=UNIFORM, responses_only=False)
    return write_run(tmp_path_factory.mktemp("full"), stage=stage)


@pytest.mark.parametrize("how", [Quantization.int8_weights, Quantization.fp8_weights])
def test_both_decoders_run_on_quantised_weights(
    how: Quantization, adapted: Path, full: Path, tmp_path: Path
) -> None:
    def answers(source: Path, decoder: Decoder, name: str, **changes: object) -> list[list[int]]:
        asked = options(source, tmp_path / name, decoder=decoder, logprobs=True, **changes)
        result = generate(asked)
        assert result.images == 3
        assert not result.problems
        return [answer.ids for answer in result.answers]

    ar = answers(adapted, Decoder.ar, "ar", quantize=how)
    assert ar == answers(full, Decoder.ar, "full_ar", quantize=how)
    dida = answers(adapted, Decoder.dida, "dida", quantize=how)
    assert dida == answers(adapted, Decoder.dida, "alone", quantize=how, batch_size=1)
    assert dida != answers(full, Decoder.dida, "full_dida", quantize=how)
    answers(adapted, Decoder.ar, "whole")
    first, second = (
        torch.tensor([row["logprobs"][:12] for row in rows(tmp_path / name)])
        for name in ("ar", "whole")
    )
    assert (first - second).abs().max() > 0, "other weights"


def test_the_command_line_quantises(adapted: Path, tmp_path: Path) -> None:
    """Log-probabilities tell eight bits from more where codes do not."""
    call = ["generate", "--run", str(adapted), "--prompt", "a cat", "--size", "3x4", "--logprobs"]
    found = {}
    for name in ("whole", "int8_weights", "fp8_weights"):
        chosen = [] if name == "whole" else ["--quantize", name]
        assert main([*call, *chosen, "--out", str(tmp_path / name)]) == 0
        (found[name],) = [tuple(row["logprobs"]) for row in rows(tmp_path / name)]
    assert len(set(found.values())) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU cannot do")
def test_dynamic_fp8_is_refused_before_the_model_is_read(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = replace(describe(adapted), checkpoint=None)
    with pytest.raises(LaunchError, match="needs a CUDA device"):
        load_model(nothing, precision=Precision.bf16, quantize=Quantization.fp8_dynamic)
    call = ["generate", "--run", str(adapted), "--prompt", "a cat", "--size", "3x4"]
    assert main([*call, "--quantize", "fp8_dynamic", "--out", str(tmp_path / "out")]) == 2
    assert "quantize=fp8_dynamic needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_loaded_model_is_smaller(full: Path) -> None:
    described = describe(full)
    whole = load_model(described, precision=Precision.fp32)
    small = load_model(described, precision=Precision.fp32, quantize=Quantization.fp8_weights)
    layers = weight_bytes(whole) - sum(
        weight.nbytes for name, weight in whole.named_parameters() if "linear" not in name
    )
    saved = weight_bytes(whole) - weight_bytes(small)
    assert 0.7 * layers < saved < 0.75 * layers


@pytest.mark.multiproc
@pytest.mark.slow
def test_ranks_that_follow_quantise_as_well(tmp_path: Path) -> None:
    run = write_run(tmp_path, stage=DiDAConfig(path=UNIFORM, responses_only=False), kv_heads=2)
    call = [sys.executable, "-m", "emu35", "generate", "--run", str(run), "--prompt", "a cat"]
    call += ["--size", "3x4", "--quantize", "int8_weights", "--decoder", "dida"]
    for tp in ("1", "2"):
        done = subprocess.run(
            [*call, "--tp", tp, "--out", str(tmp_path / tp)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Failed to load" not in done.stderr, "torchao keeps its kernels to itself"
    assert rows(tmp_path / "1")[0]["ids"] == rows(tmp_path / "2")[0]["ids"]
