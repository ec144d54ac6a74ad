"""One of several ranks that load a run or release together; run under torchrun.

Usage: tp_load_worker.py FOLDER SOURCE... -- every SOURCE is loaded with as many tensor-parallel
ranks as there are, and compared with FOLDER/whole.pt, what one process has: a rank's parameters
must be the very slices of the whole ones, and the logits equal up to the order of additions.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emu35.checkpoint.source import describe, load_model, open_source
from emu35.config import ParallelConfig, Precision
from emu35.errors import CheckpointError, LaunchError
from emu35.model.context import AttentionContext
from emu35.model.logits import vocabulary_logits
from emu35.model.mask import AttentionMask
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import current_mesh, leave

TOKENS_S = (torch.arange(40) * 37 + 5) % 400


@torch.no_grad()
def logits(model: Emu35Model) -> torch.Tensor:
    """Logits [S, V] of one document."""
    tokens_BS = TOKENS_S[None]
    context = AttentionContext(
        positions_BS=torch.arange(len(TOKENS_S))[None],
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    hidden_SBH = model(tokens_BS, context=context)
    return vocabulary_logits(model, hidden_NH=hidden_SBH[:, 0])


def cut(whole: torch.Tensor, name: str, *, rank: int, tp: int) -> torch.Tensor:
    """The part of an unpartitioned parameter that megatron-core's layers hold on ``rank``."""
    if "embedding" in name or "output_layer" in name:
        rows = -(-len(whole) // tp)
        padded = torch.cat([whole, whole.new_zeros(rows * tp - len(whole), whole.shape[1])])
        return padded.chunk(tp)[rank]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if "linear_fc2" in name or "linear_proj" in name:
        return whole.chunk(tp, dim=1)[rank]
    return whole if whole.ndim == 1 else whole.chunk(tp)[rank]


def main() -> None:
    tp = int(os.environ["WORLD_SIZE"])
    folder, *sources = map(Path, sys.argv[1:])
    whole = torch.load(folder / "whole.pt", weights_only=True)
    parallel = ParallelConfig(tp=tp)
    for source in sources:
        model = open_source(source, parallel=parallel, message=lambda text: None).model
        assert not model.training
        rank = current_mesh().tp_rank
        held = dict(model.named_parameters())
        assert held.keys() == whole["parameters"].keys()
        for name, parameter in held.items():
            expected = cut(whole["parameters"][name], name, rank=rank, tp=tp)
            assert torch.equal(parameter, expected), (source.name, name, rank)
        gap = (logits(model) - whole["logits"]).abs().max().item()
        assert gap < 1e-4 * whole["logits"].abs().max().item(), (source.name, gap)
    with pytest.raises(LaunchError, match=f"{tp} ranks were started"):
        load_model(describe(sources[0]), precision=Precision.fp32)
    described = describe(sources[0])
    behind = replace(described, step=described.step + current_mesh().tp_rank)
    with pytest.raises(CheckpointError, match=r"different checkpoints .*: steps \[1, 2"):
        load_model(behind, precision=Precision.fp32, parallel=parallel)
    leave()


if __name__ == "__main__":
    main()
