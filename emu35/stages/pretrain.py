"""Pretraining: next-token prediction over packed multimodal documents (paper section 3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from emu35.checkpoint.agree import gather
from emu35.config import LMConfig, LMStageConfig, RunConfig, TokenDataConfig
from emu35.data.batch import BatchChange, as_it_is
from emu35.data.loader import Message, TokenLoader, ValidationSet
from emu35.data.source import Source, check_vision
from emu35.errors import ConfigError, DataError
from emu35.model.attention.support import MaskKind
from emu35.parallel.collectives import is_main
from emu35.parallel.mesh import Mesh, init_mesh
from emu35.stages.language_model import build_trained, start_from
from emu35.tokens.vocabulary import Vocabulary, vocabulary_of
from emu35.train.held_out import HeldOut
from emu35.train.objective import (
    Tally,
    Term,
    TokenWeights,
    Weigh,
    counted_labels,
    nothing,
    weights_by_modality,
)
from emu35.train.step import LMTask
from emu35.train.trainer import FitResult, fit
from emu35.vision.codec import weights_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A way to look at validation documents: how their labels are weighed (None: as the stage
    weighs responses or everything, by the set's modality), and what is done to their batches. A set
    that has no label in an ``optional`` view goes without it."""

    token_weights: TokenWeights | None = None
    prepare: BatchChange = as_it_is
    finish: BatchChange = as_it_is
    optional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a stage learns from packed documents.

    Attributes:
        weigh: weights of labels from weights by modality.
        terms: of the training loss.
        masks: the attention that its batches need.
        prepare: what is done to a batch as it is read, and ``finish`` before the model sees it.
        tally: what is counted and reported beside tokens.
        views: of every validation set, by what is appended to its name.
    """

    weigh: Weigh
    terms: Sequence[Term]
    masks: MaskKind = MaskKind.packed_causal
    prepare: BatchChange = as_it_is
    finish: BatchChange = as_it_is
    tally: Tally = nothing
    views: Mapping[str, View] = field(default_factory=lambda: {"": View()})


def next_token(stage: LMStageConfig, *, weigh: Weigh) -> Objective:
    """Next-token prediction alone."""
    return Objective(
        weigh=weigh, terms=[Term(name="labels", token_weights=weigh(stage.loss_weights))]
    )


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Train as configured, or continue what ``run_dir`` holds.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    return train_on_tokens(config, run_dir=run_dir, weigh=weights_by_modality)


def train_on_tokens(config: RunConfig, *, run_dir: Path, weigh: Weigh) -> FitResult:
    """Pretraining and fine-tuning, which differ in ``weigh``; it holds for validation as well."""
    stage = config.stage
    assert isinstance(stage, LMStageConfig)
    objective = next_token(stage, weigh=weigh)
    return train_language_model(config, run_dir=run_dir, objective=lambda _: objective)


def train_language_model(
    config: RunConfig, *, run_dir: Path, objective: Callable[[Mesh], Objective]
) -> FitResult:
    """The assembly of every stage that trains a language model on packed documents; ``objective``
    is asked for once the ranks have found each other."""
    model, stage, data = config.model, config.stage, config.data
    assert isinstance(stage, LMStageConfig)
    assert isinstance(model, LMConfig)
    assert isinstance(data, TokenDataConfig)
    mesh = init_mesh(config.parallel, seed=config.seed, timeout=config.launch.timeout)
    learned = objective(mesh)
    vocabulary = vocabulary_of(config.tokenizer)
    message = print if is_main() else _say_nothing
    loader = TokenLoader(
        data=data,
        vocabulary=vocabulary,
        seed=config.seed,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        message=message,
        prepare=learned.prepare,
        reads=mesh.tp_rank == 0,
        steps=stage.steps,
        alarm=print,
    )
    try:
        _require_same_shards(loader)
        validation = _validation(
            config, mesh=mesh, vocabulary=vocabulary, learned=learned, message=message
        )
        held_out = [section.documents.source for section in validation.values()]
        _check_image_tokenizer(config, sources=[*loader.sources, *held_out])
        chunks = build_trained(config, vocabulary=vocabulary, masks=learned.masks)
        task = LMTask(
            config=config,
            mesh=mesh,
            chunks=chunks,
            loader=loader,
            validation=validation,
            terms=learned.terms,
            finish=learned.finish,
            tally=learned.tally,
            sources=[source.name for source in loader.sources],
            start_weights=partial(start_from, config=config) if stage.init_from else None,
        )
        return fit(task, config=config, run_dir=run_dir)
    finally:
        loader.close()


def _require_same_shards(loader: TokenLoader) -> None:
    """Every rank reads the files for itself and decides alone which are damaged. Collective.

    Raises:
        DataError: they came to different ends, and would train on different streams.
    """
    ranks = gather(
        {
            source.name: (source.fingerprint, [shard.name for shard in source.damaged])
            for source in loader.sources
        }
    )
    for rank, found in enumerate(ranks):
        for name, (fingerprint, left_out) in ranks[0].items():
            if found[name][0] != fingerprint:
                raise DataError(
                    f"rank {rank} does not see the shards of source {name!r} that rank 0 sees; "
                    f"left out as damaged there: {', '.join(found[name][1]) or 'none'}, on rank 0: "
                    f"{', '.join(left_out) or 'none'}. Make the files the same on every host"
                )


def _say_nothing(text: str) -> None:
    del text


def _check_image_tokenizer(config: RunConfig, *, sources: list[Source]) -> None:
    """One image tokenizer made all codes, and it is the one that a release would contain.

    Collective: the weights are large, so rank 0 alone reads them.
    """
    encoded = check_vision(sources)
    if encoded is None or config.tokenizer.vision is None:
        return
    folder = Path(config.tokenizer.vision).expanduser()
    found: str | DataError = ""
    if is_main():
        try:
            found = weights_digest(folder)
        except DataError as error:
            found = error
    found = gather(found)[0]
    if isinstance(found, DataError):
        raise DataError(f"tokenizer.vision: {found}")
    if found != encoded.digest:
        raise DataError(
            f"shard {encoded.shard} holds pictures encoded by an image tokenizer with weights "
            f"{encoded.digest[:12]}, but tokenizer.vision={folder} has weights {found[:12]} and "
            "would decode them to other pictures; set tokenizer.vision to the one that the shards "
            "were made with, or ingest them again with this one"
        )


def _validation(
    config: RunConfig, *, mesh: Mesh, vocabulary: Vocabulary, learned: Objective, message: Message
) -> dict[str, HeldOut]:
    assert isinstance(config.data, TokenDataConfig)
    sections = config.data.validation
    taken = {f"{name}{suffix}" for name in sections for suffix in learned.views if suffix}
    if names := sorted(taken & sections.keys()):
        raise ConfigError(
            f"data.validation.{names[0]} has the name that stage={config.stage.kind} gives to a "
            "view of another set; rename it"
        )
    return {
        f"{name}{suffix}": HeldOut(
            documents=ValidationSet(
                config=section,
                data=config.data,
                vocabulary=vocabulary,
                micro_batch_size=config.stage.micro_batch_size,
                dp_rank=mesh.dp_rank,
                dp_size=mesh.dp_size,
                message=_say_nothing if suffix else message,
                prepare=view.prepare,
            ),
            token_weights=view.token_weights or learned.weigh(counted_labels(section.modality)),
            every=section.every,
            finish=view.finish,
            optional=view.optional,
        )
        for name, section in sections.items()
        for suffix, view in learned.views.items()
    }
