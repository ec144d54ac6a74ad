"""Answer the mixed requests with a model split over the ranks; run under torchrun.
Usage: tensor_parallel_worker.py RESULT.json"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from tiny_engine import TOKENIZER, build, mixed_requests

from emu35.config import ParallelConfig
from emu35.inference.engine import Engine
from emu35.parallel.mesh import init_mesh, leave


def main(result: Path) -> None:
    parallel = ParallelConfig(tp=2)
    init_mesh(parallel, seed=1)
    engine = Engine(
        model=build(parallel), tokenizer=TOKENIZER, max_length=300, max_requests=3, headroom=0
    )
    for request in mixed_requests():
        engine.submit(request)
    for _ in range(3):
        engine.step()
    engine.abort(0)
    answers = [(answer.index, answer.ids, len(answer.tokens)) for answer in engine.run()]
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, answers)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(gathered))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
