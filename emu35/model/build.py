"""From configuration to a model on this rank."""

import torch

from emu35.config import EngineConfig, LMConfig, ParallelConfig, Precision
from emu35.model.attention.support import MaskKind, require_support
from emu35.model.mcore_config import transformer_config
from emu35.model.spec import layer_specs, mark_partitions
from emu35.model.transformer import Emu35Model, padded_vocabulary
from emu35.parallel import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    get_transformer_layer_offset,
)


def build_model(
    config: LMConfig,
    *,
    vocabulary_size: int,
    parallel: ParallelConfig | None = None,
    engine: EngineConfig | None = None,
    precision: Precision = Precision.fp32,
    vp_stage: int | None = None,
    whole: bool = False,
) -> Emu35Model:
    """One model chunk of this rank, uninitialised (see ``emu35.model.init``). The mesh must be
    laid out first; ``whole`` asks for all layers, wherever in a pipeline this rank stands (then
    ``parallel`` has one stage)."""
    parallel, engine = parallel or ParallelConfig(), engine or EngineConfig()
    mcore_config = transformer_config(config, parallel=parallel, engine=engine, precision=precision)
    offset = get_transformer_layer_offset(mcore_config, vp_stage=vp_stage)
    specs = layer_specs(
        config,
        engine=engine,
        num_layers=get_num_layers_to_build(mcore_config, vp_stage=vp_stage),
        first_layer=offset + 1,
    )
    model = Emu35Model(
        config=mcore_config,
        transformer_layer_spec=specs,  # type: ignore[arg-type]  # mcore takes both
        vocab_size=padded_vocabulary(vocabulary_size, tp=parallel.tp),
        max_sequence_length=config.max_position_embeddings,
        pre_process=whole
        or parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=whole
        or parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        # Positions are applied inside our core attention.
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )
    mark_partitions(model)
    model.lm_config = config
    model.vocabulary_size = vocabulary_size
    return model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model


def build_chunks(
    config: LMConfig,
    *,
    vocabulary_size: int,
    parallel: ParallelConfig,
    engine: EngineConfig | None = None,
    precision: Precision = Precision.fp32,
    masks: MaskKind = MaskKind.packed_causal,
) -> list[Emu35Model]:
    """All chunks of this rank, to be trained with ``masks``: one, or one a virtual pipeline stage.

    Raises:
        ConfigError: the attention backend cannot train this here; one that can is named.
        LaunchError: the layers need what this machine lacks.
    """
    require_support(config, parallel=parallel, precision=precision, masks=masks)
    stages = [None] if parallel.vpp == 1 else list(range(parallel.vpp))
    return [
        build_model(
            config,
            vocabulary_size=vocabulary_size,
            parallel=parallel,
            engine=engine,
            precision=precision,
            vp_stage=stage,
        )
        for stage in stages
    ]
