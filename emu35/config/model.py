"""Architectures: the language model and the IBQ image tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least, fraction


class AttentionBackend(StrEnum):
    """How the core attention computes.

    ``segment``: exact, block by block through scaled dot-product attention, any device; ``dense``:
    with the whole matrix, the oracle; ``flex``: torch's compiled flex attention, CUDA; ``flash``:
    torch's own variable-length flash attention, and ``te``: transformer-engine's, both CUDA, bf16
    and plain causal documents only. All take the same interval mask.
    """

    segment = "segment"
    dense = "dense"
    flex = "flex"
    flash = "flash"
    te = "te"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Base of every architecture; ``kind`` selects the class."""

    kind: str = "lm"

    def problems(self) -> Iterator[str]:
        yield from ()


@dataclass(kw_only=True, slots=True)
class LMConfig(ModelConfig):
    """Decoder-only transformer of Emu3.5 (paper Table 1): GQA, QK-norm, SwiGLU, untied embeddings.

    ``num_attention_heads * head_dim`` need not equal ``hidden_size`` (34B: 64 x 128 against 5120).
    The vocabulary size is not here: it follows from the tokenizer section.
    """

    kind: str = "lm"
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    attention_backend: AttentionBackend = AttentionBackend.segment

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "model",
            1,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
        )
        yield from fraction(
            "model", hidden_dropout=self.hidden_dropout, attention_dropout=self.attention_dropout
        )
        if self.num_kv_heads > 0 and self.num_attention_heads % self.num_kv_heads:
            yield (
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}; "
                "grouped-query attention needs whole groups"
            )
        if self.head_dim % 2:
            yield f"model.head_dim={self.head_dim} is odd; rotary embedding needs an even head_dim"


@dataclass(kw_only=True, slots=True)
class IBQConfig(ModelConfig):
    """IBQ image tokenizer (paper section 2.3): VQGAN encoder and decoder, dot-product codebook.

    Field names are those of the released ``ddconfig`` where one exists. ``norm_groups`` has none:
    released tokenizers always normalise 32 groups of channels, and so does the official code. A
    narrow network needs fewer, because a group of one channel loses its mean, colours with it.
    """

    kind: str = "ibq"
    ch: int = 256
    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 4
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    resolution: int = 256
    z_channels: int = 256
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0
    norm_groups: int = 32
    embed_dim: int = 256
    n_embed: int = 131072

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "model",
            1,
            ch=self.ch,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
            embed_dim=self.embed_dim,
            norm_groups=self.norm_groups,
            n_embed=self.n_embed,
            in_channels=self.in_channels,
            out_ch=self.out_ch,
            resolution=self.resolution,
        )
        yield from fraction("model", dropout=self.dropout)
        if not self.ch_mult or min(self.ch_mult) < 1:
            yield (
                f"model.ch_mult={list(self.ch_mult)} must name at least one resolution level, each "
                "a multiple of model.ch from 1"
            )
            return
        for mult in self.ch_mult:
            if self.norm_groups > 0 and (self.ch * mult) % self.norm_groups:
                yield (
                    f"model.ch={self.ch} times ch_mult={mult} is not a multiple of "
                    f"model.norm_groups={self.norm_groups}; change one of them"
                )
                break
        if self.resolution % self.factor:
            yield (
                f"model.resolution={self.resolution} is not a multiple of the downsampling "
                f"factor {self.factor} that ch_mult={list(self.ch_mult)} gives"
            )
