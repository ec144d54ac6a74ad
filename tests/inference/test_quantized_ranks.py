"""Quantised weights that are split over ranks are the parts of those of the whole model."""

import json
from pathlib import Path

import pytest
import torch
from denoise_engine import denoise_source, ranks_requests
from tiny_engine import TOKENIZER, build, model
from torchrun_ranks import run_ranks

from emu35.inference.lead import build_engine
from emu35.model.lora import RowLinear
from emu35.model.quantize import Quantization, quantizable, quantize_linears, weight_bytes

WORKER = Path(__file__).with_name("quantized_ranks_worker.py")


@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("how", [Quantization.int8_weights, Quantization.fp8_weights])
def test_two_ranks_answer_as_one_process_does(how: Quantization, tmp_path: Path) -> None:
    result = tmp_path / "answers.json"
    run_ranks([str(WORKER), str(result), how], ranks=2, timeout=180)
    found = json.loads(result.read_text())
    model()  # lays out the mesh
    alone = build().requires_grad_(False)
    quantize_linears(alone, how=how)
    (first, small), (second, _) = found["weights"]
    for name, linear in quantizable(alone).items():
        whole_OI = linear.weight.dequantize()  # type: ignore[operator]
        parts = [torch.tensor(rank[name]) for rank in (first, second)]
        if isinstance(linear, RowLinear):
            assert torch.equal(torch.cat(parts, dim=1), whole_OI)
        elif "linear_qkv" in name:
            assert torch.equal(torch.cat(parts), whole_OI)
        else:  # a rank holds its part of the gate above its part of the up projection
            halves = [part.chunk(2) for part in parts]
            order = [*(gate for gate, _ in halves), *(up for _, up in halves)]
            assert torch.equal(torch.cat(order), whole_OI)
    assert small < 0.55 * weight_bytes(alone)
    engine = build_engine(
        model=alone, tokenizer=TOKENIZER, source=denoise_source(), max_length=400, max_requests=8
    )
    for request in ranks_requests():
        engine.submit(request)
    assert found["answers"] == [answer.ids for answer in engine.run()]
