"""The image tokenizer that tests write where its size does not matter."""

from pathlib import Path
from typing import Any

import torch

from emu35.config import IBQConfig
from emu35.vision.ibq.folder import write_folder
from emu35.vision.ibq.model import IBQ


def write_tiny_ibq(folder: Path, *, codes: int, seed: int = 0, **changes: Any) -> Path:
    """Write a random tokenizer of two pixels a side of a code into ``folder``; ``changes`` replace
    fields of its configuration."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 8,
        "z_channels": 8,
        "embed_dim": 8,
        "n_embed": codes,
    }
    write_folder(IBQ(IBQConfig(**(fields | changes))), folder=folder)
    return folder
