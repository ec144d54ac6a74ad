"""The yardstick: the same architecture in a hundred lines of plain torch.

Parameter names are those of Hugging Face's Qwen3, so that one state dict fits both. Sizes: B rows,
S tokens, H hidden, N query heads, G key-value heads, D head_dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from emu35.config import LMConfig


class PlainAttention(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        hidden, self.dim = config.hidden_size, config.head_dim
        query, key = config.num_attention_heads * self.dim, config.num_kv_heads * self.dim
        self.q_proj = nn.Linear(hidden, query, bias=False)
        self.k_proj = nn.Linear(hidden, key, bias=False)
        self.v_proj = nn.Linear(hidden, key, bias=False)
        self.o_proj = nn.Linear(query, hidden, bias=False)
        self.q_norm = nn.RMSNorm(self.dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.dim, eps=config.rms_norm_eps)

    def forward(self, x_BSH: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor):
        query, key, value = (
            projection(x_BSH).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = _rotate(self.q_norm(query), cos_SD, sin_SD)
        key = _rotate(self.k_norm(key), cos_SD, sin_SD)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSH)) * self.up_proj(x_BSH))


class PlainLayer(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = PlainAttention(config)
        self.mlp = PlainMLP(config)

    def forward(self, x_BSH: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor):
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), cos_SD, sin_SD)
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class PlainBody(nn.Module):
    def __init__(self, config: LMConfig, *, vocabulary_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class PlainTransformer(nn.Module):
    """``forward`` returns the mean next-token cross-entropy of plain causal rows [B, S]."""

    def __init__(self, config: LMConfig, *, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.model = PlainBody(config, vocabulary_size=vocabulary_size)
        self.lm_head = nn.Linear(config.hidden_size, vocabulary_size, bias=False)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        cos_SD, sin_SD = self._tables(tokens_BS)
        x_BSH = self.model.embed_tokens(tokens_BS)
        for layer in self.model.layers:
            x_BSH = layer(x_BSH, cos_SD, sin_SD)
        logits_BSV = self.lm_head(self.model.norm(x_BSH[:, :-1]))
        return F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())

    def _tables(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim, device = self.config.head_dim, tokens_BS.device
        frequency_F = self.config.rope_theta ** -(torch.arange(0, dim, 2, device=device) / dim)
        angles_SF = torch.arange(tokens_BS.shape[1], device=device)[:, None] * frequency_F
        angles_SD = torch.cat([angles_SF, angles_SF], -1)
        return angles_SD.cos(), angles_SD.sin()


def _rotate(x: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos_SD + torch.cat([-second, first], -1) * sin_SD
