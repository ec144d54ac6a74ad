"""The attention mask as data: at most two half-open key intervals for every query row.

This form covers packed causal training, any bidirectional span, DiDA's noisy copies and cached
decoding (where key indices are cache slots), and costs 32 bytes a row instead of a matrix. Every
backend turns it into its own form; ``dense`` below is the definition the others are tested with.
"""

from dataclasses import dataclass

import torch


@dataclass(kw_only=True, slots=True, frozen=True)
class AttentionMask:
    """Row i of sequence b sees keys [start1, end1) and [start2, end2); an empty interval has
    end <= start. All four tensors: int64, shape [B, S]. A row with two empty intervals (padding)
    attends to nothing and its attention output is zero."""

    start1_BS: torch.Tensor
    end1_BS: torch.Tensor
    start2_BS: torch.Tensor
    end2_BS: torch.Tensor

    @classmethod
    def from_intervals(cls, intervals_BS4: torch.Tensor) -> "AttentionMask":
        """From (start1, end1, start2, end2) of every row, int64 [B, S, 4]."""
        start1_BS, end1_BS, start2_BS, end2_BS = intervals_BS4.unbind(-1)
        return cls(start1_BS=start1_BS, end1_BS=end1_BS, start2_BS=start2_BS, end2_BS=end2_BS)

    @classmethod
    def causal(
        cls, document_start_BS: torch.Tensor, *, span_end_BS: torch.Tensor | None = None
    ) -> "AttentionMask":
        """Causal within documents. ``document_start_BS`` holds the index at which each row's
        document begins; an index beyond the row itself (padding) leaves the row empty. Rows of a
        bidirectional span see it whole: ``span_end_BS`` holds the index behind it, and anything up
        to the row itself elsewhere."""
        rows_S = torch.arange(1, document_start_BS.shape[1] + 1, device=document_start_BS.device)
        end_BS = rows_S.expand_as(document_start_BS)
        if span_end_BS is not None:
            end_BS = torch.where(document_start_BS < end_BS, end_BS.maximum(span_end_BS), end_BS)
        empty_BS = torch.zeros_like(document_start_BS)
        return cls(
            start1_BS=document_start_BS,
            end1_BS=end_BS,
            start2_BS=empty_BS,
            end2_BS=empty_BS,
        )

    def take(self, rows_S: torch.Tensor) -> "AttentionMask":
        """The same mask for some of the rows; keys keep their numbers."""
        return AttentionMask(
            start1_BS=self.start1_BS.index_select(1, rows_S),
            end1_BS=self.end1_BS.index_select(1, rows_S),
            start2_BS=self.start2_BS.index_select(1, rows_S),
            end2_BS=self.end2_BS.index_select(1, rows_S),
        )

    def visible_keys(self) -> torch.Tensor:
        """How many keys each row sees, int64 [B, S]."""
        first_BS = (self.end1_BS - self.start1_BS).clamp(min=0)
        return first_BS + (self.end2_BS - self.start2_BS).clamp(min=0)

    def dense(self, num_keys: int) -> torch.Tensor:
        """The boolean matrix, shape [B, S, num_keys]; True where the query sees the key."""
        keys_K = torch.arange(num_keys, device=self.start1_BS.device)
        first = (keys_K >= self.start1_BS[..., None]) & (keys_K < self.end1_BS[..., None])
        second = (keys_K >= self.start2_BS[..., None]) & (keys_K < self.end2_BS[..., None])
        return first | second

    def to(self, device: torch.device) -> "AttentionMask":
        """The same mask on ``device``."""
        return AttentionMask(
            start1_BS=self.start1_BS.to(device),
            end1_BS=self.end1_BS.to(device),
            start2_BS=self.start2_BS.to(device),
            end2_BS=self.end2_BS.to(device),
        )
