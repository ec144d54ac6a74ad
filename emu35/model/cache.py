"""Key-value cache of one batch of sequences, filled by the core attention layer by layer."""

import torch


class KVCache:
    """Preallocated keys and values, [layer][B, G, L, D] (G key-value heads, L slots, D head dim).

    A forward over S tokens writes every row's keys to slots ``lengths_B[b] .. lengths_B[b]+S-1``.
    ``advance`` then says how many of them count; slots past a row's length are overwritten by the
    next forward, so ragged prompts are right-padded and simply advanced by their own lengths.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys_NBGLD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NBGLD = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_length = max_length
        self._longest = 0

    def append(
        self, *, layer: int, keys_SBGD: torch.Tensor, values_SBGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this forward's keys and values of ``layer`` (0-based) and return all slots in
        use, each [B, G, K, D]."""
        steps, batch = keys_SBGD.shape[:2]
        used = self._longest + steps
        if used > self.max_length:
            raise ValueError(
                f"the cache has {self.max_length} slots, but {used} are needed; "
                "create it with a larger max_length"
            )
        device = keys_SBGD.device
        slots_BS = self.lengths_B[:, None] + torch.arange(steps, device=device)
        rows_B1 = torch.arange(batch, device=device)[:, None]
        # Advanced indices around a slice put the indexed axes first: [B, S, G, D].
        self.keys_NBGLD[layer][rows_B1, :, slots_BS] = keys_SBGD.transpose(0, 1)
        self.values_NBGLD[layer][rows_B1, :, slots_BS] = values_SBGD.transpose(0, 1)
        return self.keys_NBGLD[layer][:, :, :used], self.values_NBGLD[layer][:, :, :used]

    def advance(self, counts_B: torch.Tensor) -> None:
        """Keep the first ``counts_B[b]`` tokens that the last forward wrote for row b."""
        self.lengths_B += counts_B
        self._longest = int(self.lengths_B.max())

    def reset_row(self, row: int) -> None:
        """Forget row ``row`` so that another sequence can take its place."""
        self.lengths_B[row] = 0
        self._longest = int(self.lengths_B.max())

    def select(self, rows_R: torch.Tensor) -> "KVCache":
        """A smaller cache with copies of ``rows_R`` only."""
        chosen = KVCache.__new__(KVCache)
        chosen.keys_NBGLD = self.keys_NBGLD[:, rows_R]
        chosen.values_NBGLD = self.values_NBGLD[:, rows_R]
        chosen.lengths_B = self.lengths_B[rows_R]
        chosen.max_length = self.max_length
        chosen._longest = int(chosen.lengths_B.max())
        return chosen
