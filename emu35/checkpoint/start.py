"""What a new run starts from (``stage.init_from``): a run, a release, or a Qwen3 folder.

The description is compared with the run before a weight is read: megatron-core pads and cuts
vocabulary rows to fit whatever model it loads into, and other misfits would surface as internal
errors on some rank. Then :func:`~emu35.checkpoint.source.load_into` fills the chunks of each rank,
which reads its own parts alone.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from emu35.checkpoint.agree import gather
from emu35.checkpoint.hf import check_tensors
from emu35.checkpoint.hf_config import CONFIG_JSON
from emu35.checkpoint.manifest import check_file
from emu35.checkpoint.published import (
    Published,
    computing_differences,
    different_tokenizers,
    qwen3_problems,
    read_published,
    require_same_published,
    require_same_run,
)
from emu35.checkpoint.qwen3 import OUTPUT, extend
from emu35.checkpoint.release_folder import FACTS
from emu35.checkpoint.safetensor_files import SafetensorFolder
from emu35.checkpoint.source import Described, describe
from emu35.checkpoint.unpickle import refuse_code
from emu35.config import LMConfig, Precision, TokenizerConfig
from emu35.config.io import CONFIG_FILE
from emu35.config.stage import NewRows, NewRowsConfig
from emu35.errors import CheckpointError, ReleaseError
from emu35.model.shapes import hf_shapes
from emu35.parallel.collectives import rank, world_size
from emu35.tokens.template import PromptTemplate
from emu35.tokens.vocabulary import Vocabulary, vocabulary_of

Message = Callable[[str], object]


def describe_start(
    path: Path,
    *,
    config: LMConfig,
    tokenizer: TokenizerConfig,
    new_rows: NewRowsConfig,
    seed: int,
    step: int | None = None,
    message: Message = print,
) -> Described:
    """What a new run of ``config`` and ``tokenizer`` starts from; ``new_rows`` and ``seed``
    complete the vocabulary of Qwen3. Collective.

    Args:
        step: of a run's checkpoint; None takes the newest.
        message: told what is taken and what is drawn.

    Raises:
        CheckpointError: nothing to start from, no usable checkpoint, one that would run code, or
            another architecture or vocabulary, naming every difference; for a release or Qwen3
            also another model.rope_theta or model.rms_norm_eps.
        ReleaseError: a release or a Qwen3 folder that is damaged or contradicts itself.
    """
    if (path / CONFIG_FILE).is_file():
        require_same_run(path, config=config, tokenizer=tokenizer)
        found = describe(path, step=step, message=message)
        assert found.checkpoint is not None
        refuse_code(found.checkpoint.path)
        merged = ", its adapters merged into them" if found.adapters else ""
        if found.copy_adapters:
            merged = ", without its adapters of noisy copies"
        message(f"weights of step {found.step} of the run {path}{merged}")
        if differences := computing_differences(found.config, config):
            message(f"the same weights compute something else here: {'; '.join(differences)}")
    elif (path / CONFIG_JSON).is_file():
        published = read_published(path)
        require_same_published(published, config=config, tokenizer=tokenizer)
        if published.qwen3:
            found = describe_qwen3(
                published, tokenizer=tokenizer, new_rows=new_rows, seed=seed, message=message
            )
        else:
            found = _describe_release(path, config=config, tokenizer=tokenizer, message=message)
    else:
        raise CheckpointError(
            f"stage.init_from={path} is neither a run folder ({CONFIG_FILE}) nor a release or a "
            f"Qwen3 folder ({CONFIG_JSON})"
        )
    return found


def describe_qwen3(
    published: Published,
    *,
    tokenizer: TokenizerConfig,
    new_rows: NewRowsConfig,
    seed: int,
    message: Message,
) -> Described:
    """A Qwen3 folder as a model of ``tokenizer``'s vocabulary, drawn with ``seed``. Collective.

    Raises:
        CheckpointError: another text vocabulary, or tensors that are not those of ``config.json``.
        ReleaseError: missing or damaged files.
    """
    path, config, rows = published.path, published.config, published.rows
    if problems := list(qwen3_problems(published, tokenizer=tokenizer)):
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    weights = SafetensorFolder(path)
    expected = hf_shapes(config, vocabulary_size=rows)
    if published.tied and OUTPUT not in weights:
        del expected[OUTPUT]
    check_tensors(weights, names=set(weights), expected=expected, what=str(path))
    vocabulary = vocabulary_of(tokenizer)
    message(f"weights of the Qwen3 model {path}: {len(weights)} tensors")
    message(_vocabulary_words(published, vocabulary=vocabulary, new_rows=new_rows, seed=seed))
    return Described(
        path=path,
        name=path.name,
        config=config,
        tokenizer=tokenizer,
        vision_folder=None,
        template=PromptTemplate.plain,
        precision=Precision.bf16 if weights.dtype is torch.bfloat16 else Precision.fp32,
        step=0,
        extra={},
        state=extend(
            weights,
            names=frozenset(weights),
            vocabulary=vocabulary,
            tied=published.tied,
            new_rows=new_rows,
            seed=seed,
        ),
    )


def _vocabulary_words(
    published: Published, *, vocabulary: Vocabulary, new_rows: NewRowsConfig, seed: int
) -> str:
    taken, rows = vocabulary.n_text, published.rows
    tied = "; the tied output layer starts from the embedding's text rows"
    noise = f"N(0, {new_rows.std:g})"
    mean = f"the mean of the text rows + {noise}"
    return (
        f"vocabulary {rows:,} -> {vocabulary.size:,}: {taken:,} text rows taken over, "
        f"{vocabulary.size - taken:,} rows drawn from "
        f"{mean if new_rows.policy is NewRows.mean else noise} with seed {seed} "
        f"({vocabulary.visual_start - taken} specials, {vocabulary.codebook_size:,} visual codes; "
        "the embedding of PAD is zero), "
        f"{rows - taken:,} Qwen rows dropped{tied if published.tied else ''}"
    )


def _describe_release(
    path: Path, *, config: LMConfig, tokenizer: TokenizerConfig, message: Message
) -> Described:
    found = describe(path, message=message)
    assert found.weights is not None
    if different := different_tokenizers(found.tokenizer, tokenizer):
        raise CheckpointError(f"stage.init_from={path} is another model: {'; '.join(different)}")
    expected = hf_shapes(config, vocabulary_size=found.vocabulary_size)
    check_tensors(found.weights, names=set(found.weights), expected=expected, what=str(path))
    _check_hashes(found)
    without = ", without its adapters of noisy copies" if found.copy_adapters else ""
    message(f"weights of the release {path}: {len(found.weights)} tensors{without}")
    return found


def _check_hashes(found: Described) -> None:
    """Compare the files of weights with the hashes that a release of ours has. Each file is read
    by one rank: all of them would read tens of gigabytes each. Collective."""
    assert found.weights is not None
    if found.facts is None:
        return
    listed = found.facts.files
    used = sorted({info.file for info in found.weights.info.values()})
    own = [
        check_file(found.path, name=name, entry=listed[name])
        if name in listed
        else f"{name} is not listed in {FACTS}"
        for name in used[rank() :: world_size()]
    ]
    problems = [problem for part in gather(own) for problem in part if problem]
    if problems:
        raise ReleaseError(
            f"stage.init_from={found.path} is damaged: {'; '.join(problems)}; copy it again"
        )
