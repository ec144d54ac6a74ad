"""How many parameters a model has, and how many of them one rank holds."""

from dataclasses import dataclass
from math import prod

from emu35.config.model import IBQConfig, LMConfig, ModelConfig
from emu35.config.parallel import ParallelConfig
from emu35.config.stage import LoRAConfig, LoRATarget
from emu35.model.shapes import adapted_shapes, layer_shapes, parameter_count


def count_parameters(model: ModelConfig, *, vocabulary_size: int) -> int:
    """All parameters of ``model``; ``vocabulary_size`` matters to a language model only."""
    if isinstance(model, LMConfig):
        return parameter_count(model, vocabulary_size=vocabulary_size)
    assert isinstance(model, IBQConfig)
    return _ibq(model)


COLUMN_TARGETS = (LoRATarget.linear_qkv, LoRATarget.linear_fc1)
"""Linear maps that tensor-parallel ranks split by rows of the weight; the others by columns."""


@dataclass(kw_only=True, slots=True, frozen=True)
class RankParameters:
    """The parameters of the fullest rank of a layout; ``layers`` are the decoder layers among
    them, vocabulary rows that pad the table to a multiple of tp included."""

    total: int
    layers: int


def rank_parameters(
    model: LMConfig, *, vocabulary_size: int, parallel: ParallelConfig
) -> RankParameters:
    """The fullest pipeline stage of one tensor-parallel rank.

    Projections are split over tp; norms (and with them every vector) are held by each rank, as
    megatron-core does.
    """
    shapes = layer_shapes(model).values()
    per_layer = sum(prod(s) if len(s) == 1 else prod(s) // parallel.tp for s in shapes)
    rows = -(-vocabulary_size // parallel.tp)
    embedding = rows * model.hidden_size
    stages = parallel.rank_layers(model.num_layers)
    totals = [layers * per_layer for layers in stages]
    totals[0] += embedding
    totals[-1] += embedding + model.hidden_size
    fullest = max(range(len(stages)), key=totals.__getitem__)
    return RankParameters(total=totals[fullest], layers=stages[fullest])


def layer_adapter_parameters(model: LMConfig, *, lora: LoRAConfig, parallel: ParallelConfig) -> int:
    """Adapter parameters of one layer on one tensor-parallel rank: of a column-parallel map the
    matrix B is split, of a row-parallel one A; the other is whole."""
    total = 0
    for target, (outputs, inputs) in adapted_shapes(model, lora=lora).items():
        if target in COLUMN_TARGETS:
            outputs //= parallel.tp
        else:
            inputs //= parallel.tp
        total += lora.rank * (outputs + inputs)
    return total


def _ibq(model: IBQConfig) -> int:
    """VQGAN encoder and decoder, the 1x1 convolutions around the codebook, and the codebook."""
    widths = [model.ch * multiple for multiple in model.ch_mult]
    top = widths[-1]
    middle = 2 * _residual(top, top) + _attention(top)
    encoder = _conv(model.in_channels, model.ch, 3) + middle
    encoder += _norm(top) + _conv(top, model.z_channels, 3)
    decoder = _conv(model.z_channels, top, 3) + middle
    decoder += _norm(widths[0]) + _conv(widths[0], model.out_ch, 3)
    down, up = model.ch, top
    for level, width in enumerate(widths):
        attended = model.resolution >> level in model.attn_resolutions
        encoder += _level(down, width, blocks=model.num_res_blocks, attended=attended)
        encoder += _conv(width, width, 3) if level < len(widths) - 1 else 0
        down = width
    for level, width in reversed(list(enumerate(widths))):
        attended = model.resolution >> level in model.attn_resolutions
        decoder += _level(up, width, blocks=model.num_res_blocks + 1, attended=attended)
        decoder += _conv(width, width, 3) if level > 0 else 0
        up = width
    around = _conv(model.z_channels, model.embed_dim, 1)
    around += _conv(model.embed_dim, model.z_channels, 1)
    return encoder + decoder + around + model.n_embed * model.embed_dim


def _level(inputs: int, outputs: int, *, blocks: int, attended: bool) -> int:
    own = _residual(inputs, outputs) + (blocks - 1) * _residual(outputs, outputs)
    return own + (blocks * _attention(outputs) if attended else 0)


def _residual(inputs: int, outputs: int) -> int:
    own = _norm(inputs) + _conv(inputs, outputs, 3) + _norm(outputs) + _conv(outputs, outputs, 3)
    return own + (_conv(inputs, outputs, 1) if inputs != outputs else 0)


def _attention(channels: int) -> int:
    return _norm(channels) + 4 * _conv(channels, channels, 1)


def _norm(channels: int) -> int:
    return 2 * channels


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return outputs * (inputs * kernel * kernel + 1)
