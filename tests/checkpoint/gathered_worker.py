"""What the ranks of a layout gather; alone or under torchrun.

Usage: gathered_worker.py RESULT.pt '{"parallel": {...}, "lora": true, "bucket_bytes": 3000}'
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_lm

from emu35.checkpoint.buckets import Bucket, Receiver, whole_pieces
from emu35.checkpoint.gathered import GatheredWeights
from emu35.config.schema import build, to_plain, with_defaults
from emu35.model.attention.support import MaskKind
from emu35.model.lora import adapted_linears
from emu35.parallel.mesh import init_mesh, leave
from emu35.stages.language_model import build_trained
from emu35.tokens.vocabulary import vocabulary_of


def built(spec: dict[str, Any]) -> Any:
    """The mesh and this rank's chunks; adapters that are not zero."""
    misfits: dict[str, str] = {}
    tree = {
        "model": {"kind": "lm", **to_plain(tiny_lm(init_std=0.3, num_layers=4))},
        "stage": {"kind": "grpo", "adapter": "lora" if spec.get("lora") else "none"},
        "data": {"kind": "prompts"},
        "tokenizer": {"codebook_size": 16},
        "parallel": spec.get("parallel", {}),
    }
    config = build(with_defaults(tree), misfits=misfits)
    assert config is not None, misfits
    mesh = init_mesh(config.parallel, seed=3)
    vocabulary = vocabulary_of(config.tokenizer)
    assert vocabulary.size % 2, "two ranks shall need a padding row"
    chunks = build_trained(config, vocabulary=vocabulary, masks=MaskKind.packed_causal)
    for chunk in chunks:
        for linear in adapted_linears(chunk).values():
            assert linear.adapter is not None
            # The same in each row, so the same however the rows are dealt out.
            linear.adapter.b.data += torch.arange(linear.adapter.b.shape[1]) / 50
    return mesh, chunks


def gathered(chunks: Any, *, mesh: Any, bucket_bytes: int) -> dict[str, torch.Tensor]:
    """The whole of it on rank 0, by official name."""
    weights = GatheredWeights(chunks, mesh=mesh)
    found = {spec.name: torch.full(spec.shape, torch.nan) for spec in weights.specs}
    shapes = {spec.name: spec.shape for spec in weights.specs}
    receiver = Receiver(shapes, pieces=whole_pieces(found))
    buckets: list[Bucket] = list(weights.buckets(bucket_bytes=bucket_bytes))
    for bucket in buckets:
        assert bucket.data.numel() <= bucket_bytes
        receiver.write(bucket)
    if torch.distributed.get_rank() == 0:
        receiver.finish()
    else:
        assert not buckets
    return found


def main() -> None:
    spec = json.loads(sys.argv[2])
    mesh, chunks = built(spec)
    found = gathered(chunks, mesh=mesh, bucket_bytes=spec["bucket_bytes"])
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(sys.argv[1]))
    leave()


if __name__ == "__main__":
    main()
