"""Decode with quantised weights that are split over the ranks; run under torchrun. Rank 0 leads and
the others follow. Usage: quantized_ranks_worker.py RESULT.json HOW"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from denoise_engine import denoise_source, ranks_requests
from tiny_engine import TOKENIZER, build

from emu35.config import ParallelConfig
from emu35.inference.lead import build_engine, obey
from emu35.model.quantize import Quantization, quantizable, quantize_linears, weight_bytes
from emu35.parallel.mesh import init_mesh, leave


def main(result: Path, how: Quantization) -> None:
    parallel = ParallelConfig(tp=2)
    init_mesh(parallel, seed=1)
    model = build(parallel).requires_grad_(False)
    quantize_linears(model, how=how)
    weights: list[object] = [None, None]
    ours = {
        name: linear.weight.dequantize().tolist()  # type: ignore[operator]
        for name, linear in quantizable(model).items()
    }
    dist.all_gather_object(weights, (ours, weight_bytes(model)))
    if dist.get_rank() == 0:
        numbers = {"max_length": 400, "max_requests": 8}
        engine = build_engine(model=model, tokenizer=TOKENIZER, source=denoise_source(), **numbers)
        for request in ranks_requests():
            engine.submit(request)
        answers = [answer.ids for answer in engine.run()]
        result.write_text(json.dumps({"answers": answers, "weights": weights}))
        engine.close()
    else:
        obey(model, tokenizer=TOKENIZER)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Quantization(sys.argv[2]))
