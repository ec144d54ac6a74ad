"""Initial weights that do not depend on the layout.

mcore draws each rank's shard from that rank's generator, so that a run on two tensor-parallel
ranks starts from another model than a run on one. Here every weight is defined as a whole: rows
in blocks, each drawn from a generator seeded by (seed, name, block), and a rank only draws the
blocks that it holds. Any layout then starts from the same model, which is what makes layouts
comparable step by step.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from emu35.model.names import global_name
from emu35.model.transformer import Emu35Model

ROWS_PER_BLOCK = 512


@torch.no_grad()
def initialize(model: Emu35Model, *, seed: int, pad_id: int | None = None) -> None:
    """Fill every parameter in place: N(0, init_std), divided by sqrt(2 * layers) for the two
    projections that write to the residual stream; norms are 1; the PAD embedding row is zero."""
    config = model.lm_config
    scaled_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        std = scaled_std if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None
        _fill(parameter, name=global_name(model, name), seed=seed, std=std or config.init_std)
    if pad_id is not None and model.pre_process:
        embedding = model.embedding.word_embeddings
        row = pad_id - embedding.vocab_start_index
        if 0 <= row < embedding.weight.shape[0]:
            embedding.weight[row] = 0.0


def _fill(parameter: torch.nn.Parameter, *, name: str, seed: int, std: float) -> None:
    from emu35.parallel.mesh import current_mesh

    mesh = current_mesh()
    split = bool(getattr(parameter, "tensor_model_parallel", False)) and mesh.tp_size > 1
    dimension = int(getattr(parameter, "partition_dim", 0)) if split else -1
    rows, columns = parameter.shape
    full_columns = columns * mesh.tp_size if dimension == 1 else columns
    if dimension == 0 and "linear_fc1" in name:
        # Each rank holds its part of the gate above its part of the up projection.
        half = rows // 2
        starts = [mesh.tp_rank * half, half * mesh.tp_size + mesh.tp_rank * half]
        spans = [(start, half) for start in starts]
    else:
        spans = [(mesh.tp_rank * rows if dimension == 0 else 0, rows)]
    filled = 0
    for start, count in spans:
        for block_start, block in random_blocks(
            start, count, columns=full_columns, name=name, seed=seed
        ):
            first, last = max(start, block_start), min(start + count, block_start + ROWS_PER_BLOCK)
            chosen = block[first - block_start : last - block_start]
            if dimension == 1:
                chosen = chosen[:, mesh.tp_rank * columns : (mesh.tp_rank + 1) * columns]
            parameter[filled : filled + last - first] = (chosen * std).to(parameter.device)
            filled += last - first


def random_blocks(
    start: int, count: int, *, columns: int, name: str, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The blocks of rows that overlap [start, start + count), as (first row, N(0, 1) in fp32).

    ``name`` and the number of a block seed it, so the rows of a matrix are the same whoever draws
    which of them.
    """
    for index in range(start // ROWS_PER_BLOCK, (start + count - 1) // ROWS_PER_BLOCK + 1):
        digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        yield index * ROWS_PER_BLOCK, torch.randn(ROWS_PER_BLOCK, columns, generator=generator)
