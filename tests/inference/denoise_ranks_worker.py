"""Decode pictures in parallel with a model split over the ranks; run under torchrun. Rank 0 leads
and the others follow. Usage: denoise_ranks_worker.py RESULT.json"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from denoise_engine import denoise_source, ranks_requests
from tiny_engine import TOKENIZER, build

from emu35.config import ParallelConfig
from emu35.inference.lead import build_engine, obey
from emu35.parallel.mesh import init_mesh, leave


def main(result: Path) -> None:
    parallel = ParallelConfig(tp=2)
    init_mesh(parallel, seed=1)
    model = build(parallel)
    if dist.get_rank() == 0:
        engine = build_engine(
            model=model,
            tokenizer=TOKENIZER,
            source=denoise_source(),
            max_length=400,
            max_requests=8,
        )
        for request in ranks_requests():
            engine.submit(request)
        result.write_text(json.dumps([answer.ids for answer in engine.run()]))
        engine.close()
    else:
        obey(model, tokenizer=TOKENIZER)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
