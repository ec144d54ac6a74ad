"""Opening a trained language model, wherever it lies: a run folder or a release folder.

Generation, evaluation and conversion go through here, so that a run and the release made from it
give the same model, the same tokenizer and the same prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emu35.checkpoint.agree import gather, on_all_ranks
from emu35.checkpoint.dida_adapter import fill_adapters, read_adapter
from emu35.checkpoint.hf import Shard, fill_from_hf, zero_padding
from emu35.checkpoint.hf_config import (
    CONFIG_JSON,
    EMU3,
    IMAGE_AREA,
    parse_config,
    read_json,
    read_size,
)
from emu35.checkpoint.manager import Checkpoint, find_checkpoint
from emu35.checkpoint.release_folder import (
    TEXT_FOLDER,
    VISION_FOLDER,
    ReleaseFacts,
    read_facts,
    read_noise,
)
from emu35.checkpoint.safetensor_files import SafetensorFolder
from emu35.checkpoint.steps import CHECKPOINTS
from emu35.checkpoint.unpickle import refuse_code
from emu35.config import (
    AttentionBackend,
    LMConfig,
    LoRAConfig,
    ParallelConfig,
    PathConfig,
    Precision,
    RunConfig,
    SFTConfig,
    TokenizerConfig,
    TokenizerKind,
)
from emu35.config.dida import DiDAConfig
from emu35.config.grpo import GRPOConfig
from emu35.config.io import CONFIG_FILE, read_config
from emu35.config.rules import split_problems
from emu35.config.stage import adapters_of, adapts_noisy_only
from emu35.errors import CheckpointError, ConfigError, ReleaseError
from emu35.model.build import build_model
from emu35.model.lora import attach_adapters
from emu35.model.names import weights_by_name
from emu35.model.quantize import Quantization, quantize_linears, require_quantization
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import current_mesh, inference_mesh
from emu35.tokens.release_files import text_tokenizer_config
from emu35.tokens.template import PromptTemplate
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.tokens.vocabulary import N_TEXT, vocabulary_of

RELEASE = "release"
"""Key of a checkpoint's ``extra`` under which an import keeps what only a release records."""

Message = Callable[[str], object]
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


@dataclass(kw_only=True, slots=True, frozen=True)
class Described:
    """A run or release whose description was read and checked, its weights not yet.

    ``checkpoint`` is set for a run; ``state``, the tensors under official names, for anything else;
    ``facts`` and ``weights`` for a release (``facts`` only for one of ours). ``adapters`` lie in
    the run's checkpoint beside the weights; whoever opens it sees them merged. ``copy_adapters``
    are those of noisy copies, which nothing is merged with: a model to generate with keeps them
    beside its weights, and who starts from the run or release gets the weights alone.
    ``copy_weights`` are their tensors, where ``state`` has those of the model. ``noise`` is the
    path from noise to pictures that the model was adapted to, None where it cannot decode in
    parallel. ``extra`` is what an import kept of the release it came from.
    """

    path: Path
    name: str
    config: LMConfig
    tokenizer: TokenizerConfig
    vision_folder: Path | None
    template: PromptTemplate
    precision: Precision
    step: int
    extra: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    adapters: LoRAConfig | None = None
    copy_adapters: LoRAConfig | None = None
    copy_weights: SafetensorFolder | None = None
    noise: PathConfig | None = None
    facts: ReleaseFacts | None = None
    weights: SafetensorFolder | None = None
    state: Mapping[str, torch.Tensor] | None = None

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return vocabulary_of(self.tokenizer).size

    @property
    def tokenizer_ids(self) -> tuple[str, int]:
        """What decides the ids, leaving out where files lie."""
        return self.tokenizer.kind.value, self.tokenizer.codebook_size


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """A loaded model with all that is needed to use it. The model is in evaluation mode."""

    model: Emu35Model
    config: LMConfig
    tokenizer: TextTokenizer
    vision_folder: Path | None
    template: PromptTemplate
    described: Described


def open_source(
    path: Path,
    *,
    step: int | None = None,
    precision: Precision | None = None,
    parallel: ParallelConfig | None = None,
    message: Message = print,
) -> Source:
    """Load the language model of a run folder or a release folder into this process, or this
    rank's part of it.

    Args:
        path: a run folder (``config.yaml`` and ``checkpoints``) or a release (``config.json``).
        step: a certain checkpoint of a run; the newest valid one by default.
        precision: type of the parameters; that of training or of the stored weights by default.
        parallel: as in :func:`load_model`.
        message: told about checkpoints that were passed over.

    Raises:
        CheckpointError: no run or release there, or no usable checkpoint.
        ConfigError, LaunchError: as :func:`load_model`.
        ReleaseError: a release that is damaged or contradicts itself.
        TokenizerError: the text table is missing or differs.
    """
    described = describe(path, step=step, message=message)
    return Source(
        model=load_model(described, precision=precision or described.precision, parallel=parallel),
        config=described.config,
        tokenizer=build_text_tokenizer(described.tokenizer),
        vision_folder=described.vision_folder,
        template=described.template,
        described=described,
    )


def describe(path: Path, *, step: int | None = None, message: Message = print) -> Described:
    """Find out what lies in ``path`` and verify it, without building the model.

    Raises:
        CheckpointError, ReleaseError: as :func:`open_source`.
    """
    if (path / CONFIG_FILE).is_file():
        return _describe_run(path, step=step, message=message)
    if (path / CONFIG_JSON).is_file():
        if step is not None:
            raise CheckpointError(f"{path} is a release, which has no steps; drop step={step}")
        return _describe_release(path)
    raise CheckpointError(
        f"{path} is neither a run folder ({CONFIG_FILE}) nor a release folder ({CONFIG_JSON})"
    )


def load_model(
    described: Described,
    *,
    precision: Precision,
    parallel: ParallelConfig | None = None,
    quantize: Quantization | None = None,
) -> Emu35Model:
    """Build the model, or this rank's part of it, and fill it; in evaluation mode.

    Args:
        described: what to load.
        precision: type of the parameters.
        parallel: by default the whole model in this one process. With ``tp`` = N every one of N
            ranks (of torchrun, or below :mod:`emu35.run.tp`) calls this and reads only what it
            holds; the mesh is laid out if it is not yet.
        quantize: what the linear maps of the layers become once they are filled; None leaves them.

    Raises:
        ConfigError: the model cannot be split or quantised like that, or as many ranks were not
            started.
        LaunchError: several ranks were started, but ``parallel`` asks for one; or this machine
            cannot compute what ``quantize`` asks for.
        CheckpointError, ReleaseError: the weights cannot be read or do not fit.
    """
    parallel = parallel or ParallelConfig()
    # The backend it was trained with may not exist on this machine; this one does on all.
    config = replace(described.config, attention_backend=AttentionBackend.segment)
    if problems := list(_layout_problems(parallel, config=config)):
        raise ConfigError(problems)
    if quantize is not None:
        require_quantization(quantize, config=config, precision=precision, tp=parallel.tp)
    inference_mesh(tp=parallel.tp)
    if len(steps := set(gather(described.step))) > 1:
        raise CheckpointError(
            f"ranks found different checkpoints of {described.path}: steps {sorted(steps)}; it is "
            "being trained, so name one with step"
        )
    model = build_model(
        config,
        vocabulary_size=described.vocabulary_size,
        parallel=parallel,
        precision=precision,
    )
    load_into([model], described=described, copies=True)
    model.eval().requires_grad_(False)
    if quantize is not None:
        quantize_linears(model, how=quantize)
    return model


def _layout_problems(parallel: ParallelConfig, *, config: LMConfig) -> Iterator[str]:
    """Why a model cannot be used for inference in this layout."""
    yield from parallel.problems()
    for name, size in (("pp", parallel.pp), ("cp", parallel.cp)):
        if size > 1:
            yield (
                f"{name}={size} cannot generate: a token at a time keeps all but one of these "
                f"ranks waiting; use {name}=1 and split the model by tp"
            )
    if parallel.sp:
        yield "sp=true cannot generate: one token does not divide over ranks; use sp=false"
    if parallel.tp > 1:
        yield from split_problems(parallel, model=config)


def load_into(chunks: list[Emu35Model], *, described: Described, copies: bool = False) -> None:
    """Fill models of the right architecture, or what this rank has of one in any layout, converting
    to the type of their parameters; with ``copies`` they get the adapters of noisy copies as well,
    where there are any. Collective.

    Raises:
        CheckpointError: on every rank, when the weights cannot be read or do not fit on one.
    """
    # Imported late: it pulls in megatron-core's checkpointing, which a release does not need.
    from emu35.checkpoint.sharded import load_weights

    if described.checkpoint is not None:
        refuse_code(described.checkpoint.path)
        load_weights(
            described.checkpoint.path,
            chunks=chunks,
            adapters=described.adapters,
            copy_adapters=described.copy_adapters if copies else None,
            stored=DTYPES[described.precision],
        )
        # Where more ranks make more padding, the files have no rows for it.
        for chunk in chunks:
            zero_padding(
                weights_by_name(chunk), vocabulary_size=chunk.vocabulary_size, shard=_own_shard()
            )
        return
    state = described.state
    assert state is not None
    adapters = described.copy_adapters if copies else None

    def read() -> None:
        for chunk in chunks:
            fill(chunk, state=state)
            if adapters is not None:
                assert described.copy_weights is not None
                attach_adapters(chunk, config=adapters, noisy_only=True)
                fill_adapters(
                    chunk, state=described.copy_weights, adapters=adapters, shard=_own_shard()
                )

    on_all_ranks(read, blame=lambda why: f"cannot load {described.path}: {why}")


def fill(model: Emu35Model, *, state: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors under official names into ``model``, which may be one rank's part of a model.

    Raises:
        CheckpointError: names or shapes do not fit its architecture.
    """
    fill_from_hf(
        weights_by_name(model),
        state=state,
        config=model.lm_config,
        vocabulary_size=model.vocabulary_size,
        shard=_own_shard(),
    )


def _own_shard() -> Shard:
    mesh = current_mesh()
    return Shard(rank=mesh.tp_rank, size=mesh.tp_size)


def _describe_run(path: Path, *, step: int | None, message: Message) -> Described:
    run = read_config(path)
    if not isinstance(run.model, LMConfig):
        raise CheckpointError(
            f"{path} is a run of stage={run.stage.kind}, which trains no language model"
        )
    checkpoint = find_checkpoint(path / CHECKPOINTS, step=step, message=message)
    if checkpoint is None:
        raise CheckpointError(f"{path / CHECKPOINTS} holds no checkpoint yet; train the run first")
    kept = checkpoint.extra.get(RELEASE) or {}
    template = PromptTemplate(kept["template"]) if "template" in kept else default_template(run)
    vision = run.tokenizer.vision
    return Described(
        path=path,
        name=run.name,
        config=run.model,
        tokenizer=run.tokenizer,
        vision_folder=Path(vision).expanduser() if vision else None,
        template=template,
        precision=run.stage.precision,
        step=checkpoint.step,
        extra=kept,
        checkpoint=checkpoint,
        adapters=None if adapts_noisy_only(run.stage) else adapters_of(run.stage),
        copy_adapters=adapters_of(run.stage) if adapts_noisy_only(run.stage) else None,
        noise=(
            run.stage.path if isinstance(run.stage, DiDAConfig) else read_noise(kept.get("noise"))
        ),
    )


def default_template(run: RunConfig) -> PromptTemplate:
    """Pretraining documents have no chat form; everything after it does."""
    stage = run.stage
    tuned = isinstance(stage, SFTConfig | GRPOConfig) or (
        isinstance(stage, DiDAConfig) and stage.responses_only
    )
    return PromptTemplate.official if tuned else PromptTemplate.plain


def _describe_release(path: Path) -> Described:
    where = path / CONFIG_JSON
    content = read_json(where)
    if content.get("model_type") != EMU3:
        raise ReleaseError(
            f"{where}: model_type is {content.get('model_type')!r}, not {EMU3!r}; "
            "convert it first with: emu35 convert import"
        )
    config = parse_config(content, where=where)
    facts = read_facts(path)
    vocabulary_size = read_size(content, name="vocab_size", where=where)
    tokenizer = _release_tokenizer(path, facts=facts, vocabulary_size=vocabulary_size)
    if (size := vocabulary_of(tokenizer).size) != vocabulary_size:
        raise ReleaseError(
            f"{where} says vocab_size={vocabulary_size}, but its tokenizer "
            f"({tokenizer.kind.value}, codebook {tokenizer.codebook_size}) has {size} ids"
        )
    weights = SafetensorFolder(path)
    # The names fix the number of layers: a config cannot make us count to a billion.
    if config.num_layers > len(weights):
        raise ReleaseError(
            f"{where} says num_hidden_layers={config.num_layers}, "
            f"but there are only {len(weights)} tensors"
        )
    vision = path / VISION_FOLDER
    bf16 = weights.dtype is torch.bfloat16
    origin = facts.origin if facts else {}
    adapter = read_adapter(path)
    area = IMAGE_AREA
    if "image_area" in content:
        area = read_size(content, name="image_area", where=where)
    return Described(
        path=path,
        name=str(origin.get("name", path.name)),
        config=config,
        tokenizer=tokenizer,
        vision_folder=vision if vision.is_dir() else None,
        template=facts.template if facts else PromptTemplate.official,
        precision=Precision.bf16 if bf16 else Precision.fp32,
        step=int(origin.get("step", 0)),
        extra={"image_area": area, "origin": origin},
        copy_adapters=adapter.config if adapter else None,
        copy_weights=adapter.weights if adapter else None,
        noise=adapter.noise if adapter else facts.noise if facts else None,
        facts=facts,
        weights=weights,
        state=weights,
    )


def _release_tokenizer(
    path: Path, *, facts: ReleaseFacts | None, vocabulary_size: int
) -> TokenizerConfig:
    """The tokenizer beside the weights, else what the number of ids implies (official weights
    come without theirs)."""
    if (path / TEXT_FOLDER).is_dir():
        found = text_tokenizer_config(path / TEXT_FOLDER)
        if facts and (found.kind, found.codebook_size) != (
            facts.tokenizer.kind,
            facts.tokenizer.codebook_size,
        ):
            raise ReleaseError(f"{path}: {TEXT_FOLDER} and emu35.json disagree; export it again")
        return found
    if facts:
        return replace(facts.tokenizer)
    visual_start = vocabulary_of(TokenizerConfig(kind=TokenizerKind.emu35)).visual_start
    if vocabulary_size <= visual_start:
        raise ReleaseError(
            f"{path} has no {TEXT_FOLDER}, and vocab_size={vocabulary_size} is too small for the "
            f"released text table of {N_TEXT[TokenizerKind.emu35]} ids"
        )
    return TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=vocabulary_size - visual_start)
