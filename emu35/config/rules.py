"""Rules that span sections; all broken ones are reported together."""

from collections.abc import Iterator

from emu35.config.check import divisors, seeds
from emu35.config.data import Overlong, TokenDataConfig
from emu35.config.dida import DiDAConfig, row_length
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.config.engine import FP8, FP8Recipe, LayerSpec, Recompute, RecomputeModule
from emu35.config.grpo import GRPOConfig
from emu35.config.grpo_rules import grpo_problems
from emu35.config.images import Buckets, ImageDataConfig
from emu35.config.model import IBQConfig, LMConfig
from emu35.config.parallel import CPCommType, ParallelConfig
from emu35.config.prompts import PromptDataConfig
from emu35.config.root import RunConfig
from emu35.config.stage import (
    IBQStageConfig,
    LMStageConfig,
    Precision,
    SFTConfig,
    adapters_of,
    adapts_noisy_only,
)
from emu35.config.tokenizer_eval import TokenizerEvalConfig
from emu35.errors import ConfigError

NARROWEST = 0.6
"""Shorter side of the longest bucket (21 to 9) in those of a square of its area, rounded down."""


def validate(config: RunConfig) -> None:
    """Check every section and every rule between them.

    Raises:
        ConfigError: naming every problem at once.
    """
    problems = list(find_problems(config))
    if problems:
        raise ConfigError(problems)


def find_problems(config: RunConfig) -> Iterator[str]:
    """All problems of ``config``, first within sections, then across them."""
    yield from seeds("", seed=config.seed)
    for section in (
        config.model,
        config.tokenizer,
        config.data,
        config.stage,
        config.parallel,
        config.engine,
        config.optim,
        config.guard,
        config.checkpoint,
        config.log,
        config.launch,
    ):
        yield from section.problems()
    yield from _stage_parts(config)
    yield from _tokenizer_terms(config)
    yield from _evaluation(config)
    yield from _adapters(config)
    yield from _layout(config)
    yield from _engine(config)
    yield from _batch(config)


def _stage_parts(config: RunConfig) -> Iterator[str]:
    stage = config.stage
    if isinstance(stage, LMStageConfig):
        if not isinstance(config.model, LMConfig):
            yield f"stage={stage.kind} trains a language model, but model.kind={config.model.kind}"
        if isinstance(stage, GRPOConfig):
            yield from grpo_problems(config, stage=stage)
        elif not isinstance(config.data, TokenDataConfig):
            yield f"stage={stage.kind} reads token shards, but data.kind={config.data.kind}"
        if isinstance(config.data, TokenDataConfig | PromptDataConfig) and isinstance(
            config.model, LMConfig
        ):
            longest, length = config.model.max_position_embeddings, config.data.sequence_length
            if length > longest:
                yield (
                    f"data.sequence_length={length} exceeds "
                    f"model.max_position_embeddings={longest}; shorten it or extend the model"
                )
            learns_responses = isinstance(stage, SFTConfig) or (
                isinstance(stage, DiDAConfig) and stage.responses_only
            )
            if (
                learns_responses
                and isinstance(config.data, TokenDataConfig)
                and config.data.overlong is Overlong.cut
            ):
                yield (
                    f"stage={stage.kind} learns responses, and data.overlong=cut would make "
                    "documents of the tails of long ones: a tail without its prompt teaches "
                    "nothing; use data.overlong=drop, or refuse"
                )
    elif isinstance(stage, IBQStageConfig):
        if not isinstance(config.model, IBQConfig):
            yield f"stage=ibq trains the image tokenizer, but model.kind={config.model.kind}"
        elif config.model.n_embed != config.tokenizer.codebook_size:
            yield (
                f"model.n_embed={config.model.n_embed} differs from "
                f"tokenizer.codebook_size={config.tokenizer.codebook_size}; make them equal"
            )
        elif (config.model.in_channels, config.model.out_ch) != (3, 3):
            yield (
                f"model.in_channels={config.model.in_channels} and model.out_ch="
                f"{config.model.out_ch}, but pictures have 3 channels; use 3 for both"
            )
        if not isinstance(config.data, ImageDataConfig):
            yield f"stage=ibq reads pictures, but data.kind={config.data.kind}"
        elif isinstance(config.model, IBQConfig) and config.data.resolution % config.model.factor:
            yield (
                f"data.resolution={config.data.resolution} is not a multiple of the "
                f"tokenizer's factor {config.model.factor}"
            )
        elif isinstance(config.model, IBQConfig) and config.data.crop % config.model.factor:
            yield (
                f"data.crop={config.data.crop} is not a multiple of the "
                f"tokenizer's factor {config.model.factor}"
            )
        elif config.data.bucket_group % max(stage.micro_batch_size, 1):
            yield (
                f"data.bucket_group={config.data.bucket_group} is not a multiple of "
                f"stage.micro_batch_size={stage.micro_batch_size}, so a micro-batch would hold two "
                "shapes; make it one (0: the micro-batch size itself)"
            )


def _tokenizer_terms(config: RunConfig) -> Iterator[str]:
    stage, model, data = config.stage, config.model, config.data
    if not isinstance(stage, IBQStageConfig) or not isinstance(data, ImageDataConfig):
        return
    side = data.crop or data.resolution
    if data.buckets is Buckets.aspect:
        side = int(NARROWEST * side)
    yield from stage.perceptual.problems_with(side=side)
    yield from stage.adversarial.problems_with(side=side)
    if isinstance(model, IBQConfig):
        yield from stage.distillation.problems_with(model)


def _evaluation(config: RunConfig) -> Iterator[str]:
    stage = config.stage
    if isinstance(stage, TokenizerEvalConfig) and config.parallel.model_ranks > 1:
        yield f"stage={stage.kind} is data-parallel only; set parallel.tp, pp and cp to 1"
    if not isinstance(stage, DiDAEvalConfig):
        return
    if config.parallel.model_ranks > 1 or config.launch.world_size > 1:
        yield (
            f"stage={stage.kind} works in one process; set parallel.tp, pp and cp, launch.nproc "
            "and launch.nodes to 1"
        )
    if not isinstance(config.data, TokenDataConfig):
        yield f"stage={stage.kind} reads token shards, but data.kind={config.data.kind}"


def _adapters(config: RunConfig) -> Iterator[str]:
    if adapters_of(config.stage) is None:
        return
    if config.stage.init_from is None:
        yield (
            "stage.adapter adds to frozen weights, but stage.init_from names none, so they "
            "would be random; name a run or a release there"
        )
    if config.engine.layers is LayerSpec.te:
        yield (
            "stage.adapter cannot reach into engine.layers=te, which fuses each projection "
            "with the norm before it; use engine.layers=local"
        )
    if not adapts_noisy_only(config.stage):
        return
    if not isinstance(config.stage, DiDAConfig):
        yield (
            f"stage.adapter=lora_noisy_only adapts noisy copies of pictures, which "
            f"stage={config.stage.kind} has none of; use stage=dida, or adapter=lora"
        )
    engine = config.engine
    if engine.recompute is Recompute.selective and RecomputeModule.mlp in engine.recompute_modules:
        yield (
            "stage.adapter=lora_noisy_only is told its rows layer by layer, and "
            "engine.recompute_modules=[mlp] runs a part of a layer by itself; leave mlp out, or "
            "use engine.recompute=full"
        )


def _layout(config: RunConfig) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    if isinstance(config.stage, IBQStageConfig):
        if parallel.model_ranks > 1:
            yield "stage=ibq is data-parallel only; set parallel.tp, pp and cp to 1"
        return
    if isinstance(config.stage, TokenizerEvalConfig):
        return
    sizes = (parallel.tp, parallel.pp, parallel.vpp, parallel.cp)
    if not isinstance(model, LMConfig) or min(sizes) < 1:
        return
    yield from split_problems(parallel, model=model)
    yield from _exchanged_heads(parallel, model=model)
    yield from _stages(parallel, model=model)
    if isinstance(config.data, TokenDataConfig | PromptDataConfig):
        lengths = {"data.sequence_length": config.data.sequence_length}
        if isinstance(config.stage, DiDAConfig):
            lengths["stage.noisy_length"] = config.stage.noisy_length
        cut = 2 * parallel.cp if parallel.cp > 1 else 1
        cut *= parallel.tp if parallel.sp else 1
        for name, length in lengths.items():
            if length % cut:
                yield (
                    f"{name}={length} is not a multiple of {cut}, "
                    f"which cp={parallel.cp} and sp={parallel.sp} (tp={parallel.tp}) need"
                )


def split_problems(parallel: ParallelConfig, *, model: LMConfig) -> Iterator[str]:
    """Why ``model`` cannot be split over ``parallel.tp`` ranks, as sentences."""
    for name, size in (
        ("num_kv_heads", model.num_kv_heads),
        ("ffn_hidden_size", model.ffn_hidden_size),
    ):
        if size > 0 and size % parallel.tp:
            usable = ", ".join(map(str, divisors(model.num_kv_heads)))
            yield f"tp={parallel.tp} does not divide {name}={size}; use tp in {{{usable}}}"


def _stages(parallel: ParallelConfig, *, model: LMConfig) -> Iterator[str]:
    stages = parallel.pp * parallel.vpp
    if parallel.pp_layers:
        if sum(parallel.pp_layers) != model.num_layers:
            yield (
                f"parallel.pp_layers={list(parallel.pp_layers)} sums to "
                f"{sum(parallel.pp_layers)}, not to num_layers={model.num_layers}"
            )
    elif model.num_layers > 0 and model.num_layers % stages:
        usable = ", ".join(map(str, divisors(model.num_layers)))
        yield (
            f"pp={parallel.pp} x vpp={parallel.vpp} does not divide "
            f"num_layers={model.num_layers}; use pp x vpp in {{{usable}}}, or say how many layers "
            "each stage has in parallel.pp_layers"
        )


def _engine(config: RunConfig) -> Iterator[str]:
    engine, parallel, model = config.engine, config.parallel, config.model
    if not isinstance(model, LMConfig) or not isinstance(config.stage, LMStageConfig):
        return
    if engine.fp8 is not FP8.off and config.stage.precision is not Precision.bf16:
        yield (
            f"engine.fp8={engine.fp8} needs stage.precision=bf16, not {config.stage.precision}; "
            "what is not computed in FP8 is computed in that type"
        )
    if engine.overlap_param_gather and not parallel.zero1:
        yield "engine.overlap_param_gather=true gathers what parallel.zero1=true splits; set that"
    if engine.overlap_p2p and parallel.vpp == 1:
        yield (
            "engine.overlap_p2p=true overlaps the messages of virtual pipeline stages; set "
            "parallel.vpp above 1 or drop it"
        )
    if min(parallel.tp, parallel.pp, parallel.vpp, parallel.cp) < 1:
        return
    yield from _fp8_shapes(config, model=model)
    fewest = min(parallel.stage_layers(model.num_layers), default=0)
    if engine.recompute_layers > fewest > 0:
        yield (
            f"engine.recompute_layers={engine.recompute_layers} exceeds the {fewest} layers of a "
            "pipeline stage; use at most that, or 0 for all"
        )
    if engine.bf16_edge_layers > model.num_layers // parallel.pp:
        yield (
            f"engine.bf16_edge_layers={engine.bf16_edge_layers} exceeds the "
            f"{model.num_layers // parallel.pp} layers of a pipeline stage; use fewer"
        )


def _fp8_shapes(config: RunConfig, *, model: LMConfig) -> Iterator[str]:
    """FP8 matrix products want every dimension in multiples of their block."""
    engine, parallel, data = config.engine, config.parallel, config.data
    if engine.fp8 is FP8.off or not isinstance(data, TokenDataConfig):
        return
    block = 32 if engine.fp8_recipe is FP8Recipe.mxfp8 else 16
    row = row_length(config.stage, data=data)
    tokens = config.stage.micro_batch_size * row // parallel.cp
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / tp": model.ffn_hidden_size // parallel.tp,
        "query rows / tp": model.num_attention_heads * model.head_dim // parallel.tp,
        "key rows / tp": model.num_kv_heads * model.head_dim // parallel.tp,
        "tokens of a rank": tokens // (parallel.tp if parallel.sp else 1),
    }
    for name, size in sizes.items():
        if size % block:
            yield (
                f"engine.fp8={engine.fp8} ({engine.fp8_recipe}) needs multiples of {block}, but "
                f"{name} is {size}; change the model, the layout or the sequence length"
            )


def _exchanged_heads(parallel: ParallelConfig, *, model: LMConfig) -> Iterator[str]:
    if parallel.cp == 1 or parallel.cp_comm_type is not CPCommType.a2a:
        return
    heads, groups = model.num_attention_heads // parallel.tp, model.num_kv_heads // parallel.tp
    if heads % parallel.cp or (groups and groups % parallel.cp and parallel.cp % groups):
        yield (
            f"parallel.cp_comm_type=a2a deals the {heads} query and {groups} key-value heads of a "
            f"tensor-parallel rank out to cp={parallel.cp} ranks, which does not come out even; "
            "use another cp, or cp_comm_type=all_gather"
        )


def _batch(config: RunConfig) -> Iterator[str]:
    parallel, launch, stage = config.parallel, config.launch, config.stage
    ranks = parallel.model_ranks
    if ranks < 1 or launch.world_size < 1 or stage.micro_batch_size < 1:
        return
    if launch.world_size % ranks:
        yield (
            f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} = {ranks} ranks do not "
            f"divide the {launch.world_size} ranks of launch.nodes={launch.nodes} x "
            f"launch.nproc={launch.nproc}; use a multiple of {ranks} ranks"
        )
        return
    if isinstance(stage, TokenizerEvalConfig):
        return  # batches of pictures need not come out even
    if isinstance(stage, GRPOConfig):
        return  # as many rows as the answers fill, made up to what the layout needs
    dp = launch.world_size // ranks
    if stage.global_batch_size % (dp * stage.micro_batch_size):
        yield (
            f"stage.global_batch_size={stage.global_batch_size} is not a multiple of "
            f"dp={dp} x stage.micro_batch_size={stage.micro_batch_size}; "
            f"use a multiple of {dp * stage.micro_batch_size}"
        )
    elif parallel.vpp > 1:
        micro_batches = stage.global_batch_size // (dp * stage.micro_batch_size)
        if micro_batches % parallel.pp:
            yield (
                f"parallel.vpp={parallel.vpp} interleaves micro-batches in groups of "
                f"pp={parallel.pp}, but a step has {micro_batches} of them; make "
                f"stage.global_batch_size a multiple of "
                f"{dp * stage.micro_batch_size * parallel.pp}"
            )
