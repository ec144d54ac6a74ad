"""What may name the start of a run says of itself, read without torch and without a weight.

A run folder has our own configuration, a release and a Qwen3 folder as published a ``config.json``.
That is enough to tell whether the model and the vocabulary are those of the run to be started,
which the launching host does before it starts ranks, and every rank does before it reads weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emu35.checkpoint.hf_config import CONFIG_JSON, QWEN3, parse_config, read_json, read_size
from emu35.checkpoint.safetensor_index import check_shards
from emu35.config import LayerSpec, LMConfig, RunConfig, TokenizerConfig, TokenizerKind
from emu35.config.io import CONFIG_FILE, read_config
from emu35.config.stage import adapters_of, adapts_noisy_only
from emu35.errors import CheckpointError, Emu35Error
from emu35.tokens.vocabulary import N_TEXT, vocabulary_of

SHAPING_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "head_dim",
)
"""Fields of the architecture that decide which weights there are; the others may change between
stages (dropout, context length)."""

COMPUTING_FIELDS = ("rope_theta", "rms_norm_eps")
"""Fields that change what the same weights compute. A run may give them other values than the run
it starts from; those of a release or of Qwen3 are facts about its weights."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Published:
    """The ``config.json`` of a release or of Qwen3. ``rows``: vocab_size, of ``embed_tokens``."""

    path: Path
    config: LMConfig
    rows: int
    qwen3: bool
    tied: bool


def read_published(path: Path) -> Published:
    """Read and check the ``config.json`` of a release or of a Qwen3 folder.

    Raises:
        ReleaseError: missing, damaged, or of another architecture.
    """
    where = path / CONFIG_JSON
    content = read_json(where)
    return Published(
        path=path,
        config=parse_config(content, where=where),
        rows=read_size(content, name="vocab_size", where=where),
        qwen3=content.get("model_type") == QWEN3,
        tied=bool(content.get("tie_word_embeddings")),
    )


def start_problems(path: Path, *, run: RunConfig) -> Iterator[str]:
    """Why ``run``, of a language model, cannot start from ``path``, as far as can be told without
    torch: another model or vocabulary, shards of weights that are missing or cut short, or adapters
    that could not be trained or read.
    """
    assert isinstance(run.model, LMConfig)
    try:
        if (path / CONFIG_FILE).is_file():
            require_same_run(path, config=run.model, tokenizer=run.tokenizer)
        else:
            published = read_published(path)
            require_same_published(published, config=run.model, tokenizer=run.tokenizer)
            check_shards(path)
        require_adapters_fit(path, run=run)
    except Emu35Error as error:
        yield str(error) if str(error).startswith("stage.") else f"stage.init_from: {error}"


def require_adapters_fit(path: Path, *, run: RunConfig) -> None:
    """Check that ``run`` can train its adapters on what ``path`` holds, and read those in there.

    Raises:
        CheckpointError: it cannot, with what to do instead.
        ConfigError, ReleaseError: the description in ``path`` cannot be read.
    """
    if (path / CONFIG_FILE).is_file():
        theirs = read_config(path).stage
        merged = adapters_of(theirs) and not adapts_noisy_only(theirs)
        if merged and run.engine.layers is LayerSpec.te:
            raise CheckpointError(
                f"stage.init_from={path} trained adapters, which engine.layers=te cannot read; "
                "use engine.layers=local, or export that run first and start from the release"
            )
    elif adapters_of(run.stage) and read_published(path).qwen3:
        raise CheckpointError(
            f"stage.init_from={path} is a Qwen3 model, which does not know the ids of pictures, "
            "and stage.adapter=lora would leave their rows as drawn; train all weights first "
            "(stage.adapter=none), or start from a run or release that knows the vocabulary"
        )


def require_same_run(path: Path, *, config: LMConfig, tokenizer: TokenizerConfig) -> None:
    """Check that the run in ``path`` trains this model.

    Raises:
        CheckpointError: another architecture or vocabulary, naming every difference.
        ConfigError: its configuration cannot be read.
    """
    run = read_config(path)
    if not isinstance(run.model, LMConfig):
        raise CheckpointError(
            f"{path} is a run of stage={run.stage.kind}, which trains no language model"
        )
    different = [
        *_different(run.model, config),
        *different_tokenizers(run.tokenizer, tokenizer),
    ]
    _refuse(path, different)


def require_same_published(
    found: Published, *, config: LMConfig, tokenizer: TokenizerConfig
) -> None:
    """Check that a release or a Qwen3 folder holds this model, which computes the same with it.

    Raises:
        CheckpointError: another architecture or vocabulary, naming every difference; or another
            setting of those that the weights were trained with.
    """
    different = _different(found.config, config)
    size = vocabulary_of(tokenizer).size
    if found.qwen3:
        different += list(qwen3_problems(found, tokenizer=tokenizer))
    elif found.rows != size:
        different.append(
            f"vocab_size is {found.rows} there, and the tokenizer section here "
            f"(kind={tokenizer.kind.value}, codebook_size={tokenizer.codebook_size}) has {size} ids"
        )
    _refuse(found.path, different)
    if differences := computing_differences(found.config, config):
        remedy = " ".join(
            f"model.{name}={getattr(found.config, name)!r}"
            for name in COMPUTING_FIELDS
            if getattr(found.config, name) != getattr(config, name)
        )
        raise CheckpointError(
            f"stage.init_from={found.path} would compute something else here: "
            f"{'; '.join(differences)}; set {remedy}"
        )


def qwen3_problems(found: Published, *, tokenizer: TokenizerConfig) -> Iterator[str]:
    """Why Qwen3's rows cannot be those of ``tokenizer``'s text ids."""
    if tokenizer.kind is not TokenizerKind.emu35:
        yield (
            f"tokenizer.kind={tokenizer.kind.value}, but Qwen3's embedding rows belong to the "
            "released text table; use tokenizer.kind=emu35"
        )
        return
    taken = N_TEXT[TokenizerKind.emu35]
    if found.rows < taken:
        yield (
            f"this Qwen3 model has {found.rows} embedding rows, fewer than the {taken} ids of the "
            "text table; only models with the full Qwen vocabulary can be extended"
        )


def different_tokenizers(there: TokenizerConfig, here: TokenizerConfig) -> list[str]:
    """What decides the ids and is not the same."""
    pairs = {
        "tokenizer.kind": (there.kind.value, here.kind.value),
        "tokenizer.codebook_size": (there.codebook_size, here.codebook_size),
    }
    return [f"{name} is {a} there and {b} here" for name, (a, b) in pairs.items() if a != b]


def computing_differences(there: LMConfig, here: LMConfig) -> list[str]:
    """Settings that make the same weights another function, such as the base of the rotations."""
    return [
        f"model.{name} is {getattr(there, name):g} there and {getattr(here, name):g} here"
        for name in COMPUTING_FIELDS
        if getattr(there, name) != getattr(here, name)
    ]


def _different(there: LMConfig, here: LMConfig) -> list[str]:
    return [
        f"model.{name} is {getattr(there, name)} there and {getattr(here, name)} here"
        for name in SHAPING_FIELDS
        if getattr(there, name) != getattr(here, name)
    ]


def _refuse(path: Path, different: list[str]) -> None:
    if different:
        raise CheckpointError(f"stage.init_from={path} is another model: {'; '.join(different)}")
