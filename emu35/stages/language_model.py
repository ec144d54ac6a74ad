"""The language model that a stage trains: built, filled, with adapters where they are asked for."""

from pathlib import Path

from emu35.checkpoint.published import require_adapters_fit
from emu35.checkpoint.source import load_into
from emu35.checkpoint.start import describe_start
from emu35.config import LMConfig, LMStageConfig, LoRAConfig, RunConfig
from emu35.config.stage import adapters_of, adapts_noisy_only
from emu35.model.attention.support import MaskKind
from emu35.model.build import build_chunks
from emu35.model.init import initialize
from emu35.model.lora import train_adapters
from emu35.model.shapes import adapter_count, parameter_count
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import is_main
from emu35.tokens.vocabulary import Vocabulary


def build_trained(
    config: RunConfig, *, vocabulary: Vocabulary, masks: MaskKind
) -> list[Emu35Model]:
    """This rank's chunks of the model, with initial weights; the base frozen where adapters train.

    Raises:
        ConfigError: the attention backend cannot train this here; one that can is named.
        LaunchError: the layers need what this machine lacks.
    """
    model, stage = config.model, config.stage
    assert isinstance(stage, LMStageConfig)
    assert isinstance(model, LMConfig)
    chunks = build_chunks(
        model,
        vocabulary_size=vocabulary.size,
        parallel=config.parallel,
        engine=config.engine,
        precision=stage.precision,
        masks=masks,
    )
    for chunk in chunks:
        initialize(chunk, seed=config.seed, pad_id=vocabulary.pad)
    if adapters := adapters_of(stage):
        _add_adapters(chunks, config=config, adapters=adapters, whole=vocabulary.size)
    return chunks


def _add_adapters(
    chunks: list[Emu35Model], *, config: RunConfig, adapters: LoRAConfig, whole: int
) -> None:
    """Freeze the weights and say what is left to train; ``whole`` is the vocabulary's size."""
    assert isinstance(config.model, LMConfig)
    for chunk in chunks:
        noisy_only = adapts_noisy_only(config.stage)
        train_adapters(chunk, config=adapters, seed=config.seed, noisy_only=noisy_only)
    trained = adapter_count(config.model, lora=adapters)
    total = parameter_count(config.model, vocabulary_size=whole) + trained
    if is_main():
        print(
            f"training {trained:,} of {total:,} parameters ({trained / total:.2%}): adapters of "
            f"rank {adapters.rank} at {', '.join(adapters.targets)}; everything else is frozen"
        )


def start_from(chunks: list[Emu35Model], *, config: RunConfig, step: int | None = None) -> int:
    """Fill ``chunks`` with what ``stage.init_from`` names: another run, at ``step`` or its newest
    checkpoint, a release, or Qwen3; returns the step that was taken. Collective.

    Raises:
        CheckpointError, ReleaseError: it cannot be read, or is of another kind of model.
    """
    stage = config.stage
    assert isinstance(stage, LMStageConfig)
    assert stage.init_from is not None
    assert isinstance(config.model, LMConfig)
    found = describe_start(
        Path(stage.init_from),
        config=config.model,
        tokenizer=config.tokenizer,
        new_rows=stage.new_rows,
        seed=config.seed,
        step=step,
        message=print if is_main() else _say_nothing,
    )
    require_adapters_fit(found.path, run=config)
    load_into(chunks, described=found)
    return found.step


def _say_nothing(text: str) -> None:
    del text
