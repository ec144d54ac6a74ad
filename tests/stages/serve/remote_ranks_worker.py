"""Ranks of a trainer that sample on a server; under torchrun.

Usage: remote_ranks_worker.py RESULT.json URL RUN '{"tp": 2}' -- weights are drawn anew and
sent, and the answers to all requests written down.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from trainer_side import requests

from emu35.checkpoint.gathered import GatheredWeights
from emu35.config import Precision
from emu35.config.grpo import RolloutConfig
from emu35.config.io import read_config
from emu35.config.schema import build, to_plain, with_defaults
from emu35.errors import LaunchError
from emu35.model.attention.support import MaskKind
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import init_mesh, leave
from emu35.stages.grpo.remote import RemoteEngine
from emu35.stages.grpo.replica import Replica
from emu35.stages.language_model import build_trained
from emu35.tokens.text import build_text_tokenizer


def trained(run: Path, parallel: dict[str, Any]) -> tuple[Any, Any, list[Emu35Model]]:
    """The tokenizer, the mesh, and this rank's chunks of a model like that of ``run``."""
    served = read_config(run)
    misfits: dict[str, str] = {}
    tree = {
        "seed": 77,
        "model": {"kind": "lm", **to_plain(served.model), "init_std": 0.3},
        "tokenizer": to_plain(served.tokenizer),
        "stage": {"kind": "grpo", "precision": Precision.fp32.value},
        "data": {"kind": "prompts"},
        "parallel": parallel,
    }
    config = build(with_defaults(tree), misfits=misfits)
    assert config is not None, misfits
    mesh = init_mesh(config.parallel, seed=1)
    tokenizer = build_text_tokenizer(config.tokenizer)
    chunks = build_trained(config, vocabulary=tokenizer.vocabulary, masks=MaskKind.packed_causal)
    return tokenizer, mesh, chunks


def main() -> None:
    result, url, run, parallel = sys.argv[1:]
    tokenizer, mesh, chunks = trained(Path(run), json.loads(parallel))
    replica = Replica(mesh=mesh)
    engine = RemoteEngine(
        config=RolloutConfig(servers=[url], timeout=60.0, bucket_bytes=5000),
        tokenizer=tokenizer,
        replica=replica,
        weights=GatheredWeights(chunks, mesh=mesh),
        gather_parameters=lambda: None,
        version=lambda: 5,
    )
    asked = requests(tokenizer)
    own = replica.part(replica.share(list(enumerate(asked))))
    engine.prepare([request for _, request in own])
    owners = {engine.submit(request): number for number, request in own}
    found: dict[int, list[int]] = {}
    while engine.busy:
        found |= {owners[answer.index]: answer.ids for answer in engine.step()}
    engine.release()
    # Nobody is left: every rank has to hear of it.
    engine._version = lambda: 6
    engine._config.servers = ["http://127.0.0.1:9"]
    try:
        engine.prepare([])
    except LaunchError as error:
        refusal = str(error)
    else:
        refusal = ""
    engine.close()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (found, refusal))
    if dist.get_rank() == 0:
        answers = {number: ids for part, _ in every for number, ids in part.items()}
        refusals = [each for _, each in every]
        text = json.dumps({"answers": [answers[n] for n in sorted(answers)], "refusals": refusals})
        Path(result).write_text(text)
    leave()


if __name__ == "__main__":
    main()
