"""Encoder and decoder of VQGAN (arXiv 2012.09841), under the parameter names of the release.

Attribute names (``norm1``, ``nin_shortcut``, ``attn_1``...) are part of the release format, which
is why they are not spelled the way the rest of emu35 would. Tensors are ``[B, C, H, W]``.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from emu35.config import IBQConfig

NORM_EPS = 1e-6


def _norm(channels: int, *, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def _conv(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)


class ResidualBlock(nn.Module):
    """Two times norm, swish, 3x3 convolution, around which the input is added."""

    def __init__(self, inputs: int, *, outputs: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs, groups=groups)
        self.conv1 = _conv(inputs, outputs, kernel=3)
        self.norm2 = _norm(outputs, groups=groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(outputs, outputs, kernel=3)
        widens = inputs != outputs
        self.nin_shortcut = _conv(inputs, outputs, kernel=1) if widens else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv1(functional.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(self.dropout(functional.silu(self.norm2(h_BCHW))))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of the grid."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups=groups)
        self.q = _conv(channels, channels, kernel=1)
        self.k = _conv(channels, channels, kernel=1)
        self.v = _conv(channels, channels, kernel=1)
        self.proj_out = _conv(channels, channels, kernel=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        height = x_BCHW.shape[2]
        h_BCHW = self.norm(x_BCHW)
        q_BSC, k_BSC, v_BSC = (
            projection(h_BCHW).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )
        mixed_BSC = functional.scaled_dot_product_attention(q_BSC, k_BSC, v_BSC)
        mixed_BCHW = mixed_BSC.transpose(1, 2).unflatten(2, (height, -1))
        return x_BCHW + self.proj_out(mixed_BCHW)


class Downsample(nn.Module):
    """Halves both sides by a strided convolution, padded right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, kernel=3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, kernel=3)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; ``attn`` is empty or has one entry a block.

    ``downsample`` or ``upsample`` leads to the next level, where there is one.
    """

    def __init__(
        self,
        inputs: int,
        *,
        outputs: int,
        blocks: int,
        attention: bool,
        dropout: float,
        groups: int,
    ) -> None:
        super().__init__()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None
        widths = [inputs] + [outputs] * (blocks - 1)
        self.block = nn.ModuleList(
            ResidualBlock(width, outputs=outputs, dropout=dropout, groups=groups)
            for width in widths
        )
        self.attn = nn.ModuleList(
            AttentionBlock(outputs, groups=groups) for _ in range(blocks if attention else 0)
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, outputs=channels, dropout=dropout, groups=groups)
        self.attn_1 = AttentionBlock(channels, groups=groups)
        self.block_2 = ResidualBlock(channels, outputs=channels, dropout=dropout, groups=groups)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Pixels ``[B, 3, H, W]`` to features ``[B, z_channels, H / factor, W / factor]``."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        last = len(config.ch_mult) - 1
        self.conv_in = _conv(config.in_channels, config.ch, kernel=3)
        self.down = nn.ModuleList()
        width = config.ch
        for index, multiple in enumerate(config.ch_mult):
            level = Level(
                width,
                outputs=config.ch * multiple,
                blocks=config.num_res_blocks,
                attention=_has_attention(config, index),
                dropout=config.dropout,
                groups=config.norm_groups,
            )
            width = config.ch * multiple
            if index < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, dropout=config.dropout, groups=config.norm_groups)
        self.norm_out = _norm(width, groups=config.norm_groups)
        self.conv_out = _conv(width, config.z_channels, kernel=3)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_in(pixels_B3HW)
        for level in self.down:
            assert isinstance(level, Level)
            h_BCHW = level(h_BCHW)
            if level.downsample is not None:
                h_BCHW = level.downsample(h_BCHW)
        return self.conv_out(functional.silu(self.norm_out(self.mid(h_BCHW))))


@dataclass(kw_only=True, slots=True)
class Decoded:
    """Pixels ``[B, 3, H, W]``, and by stage the features that were to be kept."""

    pixels_B3HW: torch.Tensor
    features: dict[int, torch.Tensor]


class Decoder(nn.Module):
    """Features back to pixels; one residual block more a level than the encoder.

    ``up[0]`` is the highest resolution, so levels run from the last to the first.
    """

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        self.conv_in = _conv(config.z_channels, width, kernel=3)
        self.mid = Middle(width, dropout=config.dropout, groups=config.norm_groups)
        levels: list[Level] = []
        for index in reversed(range(len(config.ch_mult))):
            outputs = config.ch * config.ch_mult[index]
            level = Level(
                width,
                outputs=outputs,
                blocks=config.num_res_blocks + 1,
                attention=_has_attention(config, index),
                dropout=config.dropout,
                groups=config.norm_groups,
            )
            width = outputs
            if index > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width, groups=config.norm_groups)
        self.conv_out = _conv(width, config.out_ch, kernel=3)

    def forward(self, z_BCHW: torch.Tensor, *, keep: Collection[int] = ()) -> Decoded:
        """Decode, and return what stages ``keep`` leave behind (:func:`decoder_channels`)."""
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        features = {0: h_BCHW} if 0 in keep else {}
        for stage, level in enumerate(reversed(self.up), start=1):
            assert isinstance(level, Level)
            h_BCHW = level(h_BCHW)
            if level.upsample is not None:
                h_BCHW = level.upsample(h_BCHW)
            if stage in keep:
                features[stage] = h_BCHW
        pixels_B3HW = self.conv_out(functional.silu(self.norm_out(h_BCHW)))
        return Decoded(pixels_B3HW=pixels_B3HW, features=features)


def decoder_channels(config: IBQConfig) -> list[int]:
    """Channels of what each stage of the decoder leaves behind, in the order in which they run: the
    middle, then every level with its upsampling, from the lowest resolution to the highest."""
    widths = [config.ch * multiple for multiple in reversed(config.ch_mult)]
    return [widths[0], *widths]


def _has_attention(config: IBQConfig, level: int) -> bool:
    """Attention goes by the training resolution, also when other sizes are fed later."""
    return config.resolution // 2**level in config.attn_resolutions
