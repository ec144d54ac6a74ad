"""What travels with the hidden states to every core attention: positions, mask, cache."""

from dataclasses import dataclass, field
from typing import Any

import torch

from emu35.model.cache import CachedForward
from emu35.model.context_parallel import SequenceSplit
from emu35.model.mask import AttentionMask
from emu35.parallel import cpu

cpu.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402


@dataclass
class AttentionContext(PackedSeqParams):
    """Rides in mcore's ``packed_seq_params`` argument, which reaches the core attention of every
    layer and is kept in closures by recomputation (a global would be stale under 1F1B).

    ``qkv_format`` "sbhd" tells mcore not to interpret it. ``positions_BS`` are rotary positions,
    int64 [B, S]. With a ``cache``, B is 1 and the cache's spans say what is seen, not ``mask``.
    With a ``split``, positions are those of this rank's rows and ``mask`` is its ``local_mask``. A
    mask may stay on the CPU: each backend moves what it derives from it. ``adapted_BS`` marks the
    rows that adapters of noisy copies add to, bool [B, S] (this rank's columns, all of them under
    sequence parallelism; None: no row); without such adapters it means nothing.
    """

    qkv_format: str = "sbhd"
    positions_BS: torch.Tensor | None = None
    mask: AttentionMask | None = None
    cache: CachedForward | None = None
    split: SequenceSplit | None = None
    adapted_BS: torch.Tensor | None = None
    # Derived once a forward and shared by the layers: rotary tables, dense masks, segments.
    derived: dict[Any, Any] = field(default_factory=dict)
