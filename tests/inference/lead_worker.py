"""Rank 0 leads two engines one after the other, then one that fails on rank 0 alone; run under
torchrun. Usage: lead_worker.py RESULT.json"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from tiny_engine import TOKENIZER, build, mixed_requests

from emu35.config import ParallelConfig
from emu35.errors import ConfigError, LaunchError
from emu35.inference.lead import build_engine, obey
from emu35.inference.request import Request
from emu35.parallel.mesh import init_mesh
from emu35.run.worker import leave


def lead(result: Path) -> None:
    model, answers = build(ParallelConfig(tp=2)), []
    for _ in range(2):
        engine = build_engine(model=model, tokenizer=TOKENIZER, max_length=300, max_requests=3)
        for request in mixed_requests():
            engine.submit(request)
        try:
            engine.submit(Request(prompt=()))
        except ConfigError:
            engine.abort(engine.submit(mixed_requests()[0]))
        answers.append([answer.ids for answer in engine.run()])
        engine.close()

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room for this layer")

    engine = build_engine(model=model, tokenizer=TOKENIZER, max_length=300)
    engine.submit(mixed_requests()[0])
    refusal = ""
    with model.decoder.layers[1].register_forward_pre_hook(out_of_memory):
        try:
            engine.step()
        except MemoryError:
            try:
                engine.abort(0)
            except LaunchError as error:
                refusal = str(error)
    result.write_text(json.dumps({"answers": answers, "refusal": refusal}))


def follow() -> None:
    model = build(ParallelConfig(tp=2))
    for _ in range(2):
        obey(model, tokenizer=TOKENIZER)
    # Rank 0 leaves the last one in the middle of a step.
    with suppress(RuntimeError):
        obey(model, tokenizer=TOKENIZER)


if __name__ == "__main__":
    init_mesh(ParallelConfig(tp=2), seed=1)
    if dist.get_rank() == 0:
        lead(Path(sys.argv[1]))
    else:
        follow()
    leave(0)
