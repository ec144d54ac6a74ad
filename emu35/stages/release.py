"""From a run to a release, back, and the proof that they are the same model.

``export`` writes the official formats, ``import_`` reads them (and Qwen3's) into a folder that
looks like a run, ``verify`` compares: names, shapes, types, hashes, every weight, and logits.
Exporting, importing and exporting again gives the same bytes. The checks themselves are in
:mod:`emu35.stages.release_verify`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from emu35.checkpoint import sharded
from emu35.checkpoint.dida_adapter import ADAPTER_FOLDER, write_adapter
from emu35.checkpoint.hf import to_hf
from emu35.checkpoint.hf_config import (
    CONFIG_JSON,
    GENERATION_JSON,
    IMAGE_AREA,
    QWEN3,
    config_json,
    generation_json,
    read_json,
)
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.published import read_published
from emu35.checkpoint.release_folder import (
    TEXT_FOLDER,
    VISION_FOLDER,
    ReleaseFacts,
    copy_vision_tokenizer,
    damaged_files,
    write_facts,
    write_json,
)
from emu35.checkpoint.safetensor_files import SHARD_BYTES, write_safetensors
from emu35.checkpoint.source import (
    DTYPES,
    RELEASE,
    Described,
    describe,
    load_into,
    load_model,
)
from emu35.checkpoint.start import describe_qwen3
from emu35.checkpoint.steps import CHECKPOINTS
from emu35.config import (
    Adapter,
    CheckpointConfig,
    DiDAConfig,
    Precision,
    PretrainConfig,
    RunConfig,
    TokenDataConfig,
    TokenizerConfig,
    TokenizerKind,
)
from emu35.config.io import write_config
from emu35.config.stage import NewRowsConfig
from emu35.errors import ReleaseError
from emu35.model.build import build_model
from emu35.model.names import base_weights
from emu35.model.shapes import parameter_count
from emu35.model.transformer import Emu35Model
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.output import appearing, refuse_nonempty
from emu35.stages.release_verify import Check, VerifyOptions, verify
from emu35.tokens.release_files import text_tokenizer_config, write_text_tokenizer
from emu35.tokens.template import PromptTemplate
from emu35.tokens.vocabulary import vocabulary_of

__all__ = [
    "Check",
    "ExportOptions",
    "ImportOptions",
    "VerifyOptions",
    "export",
    "import_",
    "verify",
]

Message = Callable[[str], object]


@dataclass(kw_only=True, slots=True, frozen=True)
class ExportOptions:
    """``run`` is a run folder (or a release, to convert its type); ``step`` the newest by default.

    ``dtype`` is that of training by default; ``template`` the form of prompts the model knows, by
    default plain after pretraining and official after fine-tuning.
    """

    run: Path
    out: Path
    step: int | None = None
    dtype: Precision | None = None
    template: PromptTemplate | None = None
    max_shard_bytes: int = SHARD_BYTES


@dataclass(kw_only=True, slots=True, frozen=True)
class ImportOptions:
    """``source`` is a release or a Qwen3 folder as published; ``out`` the run-like folder to make.

    ``tokenizer`` and ``vision`` replace what the release brings or implies (Qwen3: the released
    text table and 131,072 visual codes). ``new_rows`` and ``seed`` draw the rows that Qwen3 does
    not have; a run that starts from the Qwen3 folder itself draws the same ones with the same two.
    """

    source: Path
    out: Path
    tokenizer: TokenizerConfig | None = None
    vision: Path | None = None
    template: PromptTemplate | None = None
    new_rows: NewRowsConfig = field(default_factory=NewRowsConfig)
    seed: int = 1234


def export(options: ExportOptions, *, message: Message = print) -> Path:
    """Write the release of a run; ``options.out`` appears only when it is complete.

    Raises:
        ReleaseError: ``out`` is not empty, the disk is full, or the image tokenizer is missing.
        CheckpointError: the run has no usable checkpoint.
    """
    refuse_nonempty(options.out)
    found = describe(options.run, step=options.step, message=message)
    template = options.template or found.template
    precision = options.dtype or found.precision
    if found.copy_adapters is not None:
        message(
            f"{options.run} adapts noisy copies alone: nothing is merged, the weights decode token "
            f"by token as those it was adapted from; the adapters lie beside them in "
            f"{ADAPTER_FOLDER}, for emu35 to decode in parallel"
        )
    model = load_model(found, precision=found.precision)
    vocabulary = vocabulary_of(found.tokenizer)
    area = int(found.extra.get("image_area", IMAGE_AREA))
    with appearing(options.out) as folder:
        write_safetensors(
            to_hf(
                base_weights(model),
                config=found.config,
                vocabulary_size=vocabulary.size,
            ),
            folder=folder,
            dtype=DTYPES[precision],
            max_shard_bytes=options.max_shard_bytes,
        )
        write_json(
            config_json(found.config, vocabulary=vocabulary, precision=precision, image_area=area),
            path=folder / CONFIG_JSON,
        )
        write_json(generation_json(vocabulary), path=folder / GENERATION_JSON)
        if found.copy_adapters is not None:
            assert found.noise is not None
            write_adapter(
                model,
                config=found.copy_adapters,
                noise=found.noise,
                release=folder,
                dtype=DTYPES[precision],
            )
        write_text_tokenizer(folder / TEXT_FOLDER, config=found.tokenizer)
        if found.vision_folder:
            copy_vision_tokenizer(found.vision_folder, folder=folder)
        else:
            message("the run names no image tokenizer (tokenizer.vision): the release has none")
        facts = ReleaseFacts(
            tokenizer=found.tokenizer,
            template=template,
            parameters=parameter_count(found.config, vocabulary_size=vocabulary.size),
            noise=None if found.copy_adapters else found.noise,
            origin=dict(found.extra.get("origin") or {"name": found.name, "step": found.step}),
        )
        write_facts(facts, folder=folder)
    message(
        f"released step {found.step} of {found.path} as {options.out}: "
        f"{facts.parameters:,} parameters, {precision.value}, prompts {template.value}"
    )
    return options.out


def import_(options: ImportOptions, *, message: Message = print) -> Path:
    """Make a run-like folder from a release or from Qwen3: ``config.yaml`` and step 0.

    Raises:
        ReleaseError: the source is damaged or of another architecture, or ``out`` is not empty.
    """
    refuse_nonempty(options.out)
    content = read_json(options.source / CONFIG_JSON)
    if content.get("model_type") == QWEN3:
        origin = _qwen3(options, message=message)
    else:
        origin = _release(options, message=message)
    with appearing(options.out) as folder:
        run = _run_config(origin, out=options.out)
        _copy_tokenizers(origin, run=run, options=options, folder=folder)
        write_config(run, folder)
        model = _filled(origin)
        manager = CheckpointManager(
            root=folder / CHECKPOINTS,
            config=CheckpointConfig(),
            identity={"imported": str(content.get("model_type"))},
            message=message,
        )
        manager.save(
            0,
            write=lambda place: sharded.save(place, chunks=[model], optimizer=None),
            extra={RELEASE: origin.kept},
        )
    message(f"imported {options.source} as the run {options.out}, step 0")
    return options.out


@dataclass(kw_only=True, slots=True, frozen=True)
class _Origin:
    """What an import found; ``kept`` is what only a release records."""

    found: Described
    tokenizer: TokenizerConfig
    vision: Path | None
    kept: dict[str, object]


def _release(options: ImportOptions, *, message: Message) -> _Origin:
    found = describe(options.source, message=message)
    if found.weights is None:
        raise ReleaseError(f"{options.source} is a run folder already; there is nothing to import")
    if found.facts and (problems := damaged_files(options.source, facts=found.facts)):
        raise ReleaseError(f"{options.source} is damaged: {'; '.join(problems)}")
    if found.facts is None:
        message(f"{options.source} has no emu35.json: nothing to compare its hashes with")
    tokenizer = options.tokenizer or found.tokenizer
    if vocabulary_of(tokenizer).size != found.vocabulary_size:
        raise ReleaseError(
            f"the tokenizer has {vocabulary_of(tokenizer).size} ids, the model "
            f"{found.vocabulary_size}; use the tokenizer that it was trained with"
        )
    return _Origin(
        found=found,
        tokenizer=tokenizer,
        vision=options.vision or found.vision_folder,
        kept={
            **found.extra,
            "template": (options.template or found.template).value,
            # Adapters of noisy copies bring theirs into the stage's section.
            **({"noise": asdict(found.noise)} if found.noise and not found.copy_adapters else {}),
        },
    )


def _qwen3(options: ImportOptions, *, message: Message) -> _Origin:
    tokenizer = options.tokenizer or TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131072)
    found = describe_qwen3(
        read_published(options.source),
        tokenizer=tokenizer,
        new_rows=options.new_rows,
        seed=options.seed,
        message=message,
    )
    return _Origin(
        found=found,
        tokenizer=tokenizer,
        vision=options.vision,
        kept={"template": (options.template or found.template).value},
    )


def _run_config(origin: _Origin, *, out: Path) -> RunConfig:
    found = origin.found
    longest = found.config.max_position_embeddings
    stage = PretrainConfig(precision=found.precision)
    if found.copy_adapters is not None:
        assert found.noise is not None
        stage = DiDAConfig(
            precision=found.precision,
            path=found.noise,
            adapter=Adapter.lora_noisy_only,
            lora=found.copy_adapters,
        )
    return RunConfig(
        name=found.name,
        run_dir=str(out),
        model=found.config,
        tokenizer=TokenizerConfig(
            kind=origin.tokenizer.kind,
            codebook_size=origin.tokenizer.codebook_size,
            table=origin.tokenizer.table,
        ),
        data=TokenDataConfig(sequence_length=min(1024, longest)),
        stage=stage,
    )


def _copy_tokenizers(
    origin: _Origin, *, run: RunConfig, options: ImportOptions, folder: Path
) -> None:
    """Take the tokenizers along, so that the imported run outlives the folder it came from."""
    home = options.out.absolute()
    if origin.vision:
        copy_vision_tokenizer(origin.vision, folder=folder)
        run.tokenizer.vision = str(home / VISION_FOLDER)
    if options.tokenizer is None and (options.source / TEXT_FOLDER).is_dir():
        write_text_tokenizer(folder / TEXT_FOLDER, config=origin.tokenizer)
        copied = text_tokenizer_config(folder / TEXT_FOLDER)
        if copied.table:
            run.tokenizer.table = str(home / TEXT_FOLDER / Path(copied.table).name)


def _filled(origin: _Origin) -> Emu35Model:
    single_process_mesh()
    model = build_model(
        origin.found.config,
        vocabulary_size=vocabulary_of(origin.tokenizer).size,
        precision=origin.found.precision,
    )
    load_into([model], described=origin.found, copies=True)
    return model
