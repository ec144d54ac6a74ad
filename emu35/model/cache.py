"""Keys and values of sequences in flight: one arena of slots, filled layer by layer.

Suffixes: N layers, G key-value heads, L slots of the arena, D head dim, S tokens of one forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive tokens of one sequence within a forward.

    The sequence's keys lie in slots ``start, start + 1, ...``; ``length`` of them are from earlier
    forwards, and this one adds ``count``. ``causal``: a token sees the keys up to its own. If not,
    all tokens of the span see each other as well, which is how an image canvas is denoised: its
    keys are written behind the prefix and overwritten by the next forward.
    """

    start: int
    length: int
    count: int
    causal: bool = True


class KVCache:
    """Preallocated keys and values of ``slots`` tokens, [layer][G, L, D]. Who owns which slots is
    the caller's business (:mod:`emu35.inference.arena`)."""

    def __init__(
        self,
        *,
        num_layers: int,
        slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, num_kv_heads, slots, head_dim)
        self.keys_NGLD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NGLD = torch.zeros(shape, dtype=dtype, device=device)

    def move(self, source: int, target: int, count: int) -> None:
        """Copy ``count`` slots from ``source`` to ``target``; the two ranges may overlap."""
        for states_NGLD in (self.keys_NGLD, self.values_NGLD):
            for states_GLD in states_NGLD:
                moved_GCD = states_GLD[:, source : source + count].clone()
                states_GLD[:, target : target + count] = moved_GCD


class CachedForward:
    """What one forward of a row of tokens [1, S] does with the cache: ``spans`` cover the row in
    order. A prefix and the span behind it that is not causal may belong to one sequence."""

    def __init__(self, cache: KVCache, *, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.spans = tuple(spans)
        slots = [
            torch.arange(span.start + span.length, span.start + span.length + span.count)
            for span in self.spans
        ]
        self._slots_S = torch.cat(slots).to(cache.keys_NGLD.device)

    def write(
        self, *, layer: int, key_GSD: torch.Tensor, value_GSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this forward's keys and values of ``layer`` (0-based); all slots [G, L, D]."""
        key_GLD, value_GLD = self.cache.keys_NGLD[layer], self.cache.values_NGLD[layer]
        key_GLD.index_copy_(1, self._slots_S, key_GSD)
        value_GLD.index_copy_(1, self._slots_S, value_GSD)
        return key_GLD, value_GLD
