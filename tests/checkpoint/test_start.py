"""What a run may start from, the rows that are drawn for it, and what it says about the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen3 import ROWS, TEXT_ROWS, TOKENIZER, make_qwen3, model_of

from emu35.checkpoint.hf import fill_from_hf
from emu35.checkpoint.hf_config import CONFIG_JSON
from emu35.checkpoint.qwen3 import EMBEDDING, OUTPUT
from emu35.checkpoint.safetensor_files import SafetensorFolder
from emu35.checkpoint.source import Described, load_into
from emu35.checkpoint.start import describe_start
from emu35.cli import main
from emu35.config import (
    Adapter,
    EngineConfig,
    LayerSpec,
    LMConfig,
    PretrainConfig,
    RunConfig,
    SourceConfig,
    TokenDataConfig,
    TokenizerConfig,
)
from emu35.config.io import write_config
from emu35.config.stage import NewRows, NewRowsConfig
from emu35.errors import CheckpointError, ConfigError, Emu35Error, ReleaseError
from emu35.model.build import build_model
from emu35.model.names import weights_by_name
from emu35.parallel.mesh import single_process_mesh
from emu35.run.preflight import check_inputs
from emu35.stages.release import ExportOptions, ImportOptions, export, import_
from emu35.tokens.vocabulary import vocabulary_of

MODEL = model_of(hidden=8, layers=1)
VOCABULARY = vocabulary_of(TOKENIZER)
RELEASED = TokenizerConfig(codebook_size=16)


def describe(path: Path, **changes: Any) -> Described:
    options: dict[str, Any] = {
        "config": MODEL,
        "tokenizer": TOKENIZER,
        "new_rows": NewRowsConfig(),
        "seed": 7,
        "message": lambda text: None,
    }
    return describe_start(path, **(options | changes))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("qwen") / "qwen3"
    make_qwen3(folder, model=MODEL, dtype=torch.bfloat16, shard_size="2MB")
    return folder


@pytest.fixture
def qwen3(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, made of links."""
    folder = tmp_path / "qwen3"
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, published: Path, table: Path) -> Path:
    """A release of ours with Qwen3's weights."""
    assert table.is_file()
    folder = tmp_path_factory.mktemp("released")
    options = ImportOptions(source=published, out=folder / "run", tokenizer=TOKENIZER)
    import_(options, message=lambda text: None)
    export(ExportOptions(run=folder / "run", out=folder / "rel"), message=lambda text: None)
    return folder / "rel"


def matrices(described: Described) -> tuple[torch.Tensor, torch.Tensor]:
    assert described.state is not None
    return described.state[EMBEDDING], described.state[OUTPUT]


@pytest.mark.parametrize("policy", list(NewRows))
def test_new_rows_follow_their_policy(published: Path, policy: NewRows) -> None:
    # Enough rows for their mean to tell the policies apart.
    wide = replace(TOKENIZER, codebook_size=20_000)
    described = describe(
        published, tokenizer=wide, new_rows=NewRowsConfig(policy=policy, std=0.003)
    )
    stored = SafetensorFolder(published)
    for name, found in zip((EMBEDDING, OUTPUT), matrices(described), strict=True):
        assert found.shape == (vocabulary_of(wide).size, 8)
        text = stored[name][:TEXT_ROWS]
        assert torch.equal(found[:TEXT_ROWS], text.float())
        new = found[VOCABULARY.pad + 1 :]
        assert new.dtype is torch.float32
        mean = text.double().mean(0).float() if policy is NewRows.mean else torch.zeros(8)
        # Twenty thousand rows: five of their mean's standard deviations.
        assert (new.mean(0) - mean).abs().max() < 5 * 0.003 / 20_000**0.5
        assert new.std(0).sub(0.003).abs().max() < 1e-4
        assert len(new.unique(dim=0)) == len(new)
        if policy is NewRows.mean:
            assert text.float().mean(0).abs().min() > 0.01, "a mean that is told from zero"
    embedding, output = matrices(described)
    assert not embedding[VOCABULARY.pad].any()
    assert output[VOCABULARY.pad].any()
    assert not torch.equal(embedding[VOCABULARY.pad + 1 :], output[VOCABULARY.pad + 1 :])


def test_without_noise_a_new_row_is_the_mean(published: Path) -> None:
    described = describe(published, new_rows=NewRowsConfig(std=0.0))
    stored = SafetensorFolder(published)
    for name, found in zip((EMBEDDING, OUTPUT), matrices(described), strict=True):
        mean = stored[name][:TEXT_ROWS].double().mean(0)
        new = found[VOCABULARY.pad + 1 :]
        assert torch.allclose(new.double(), mean.expand_as(new), rtol=1e-6, atol=0)


def test_rows_depend_on_the_seed_and_not_on_who_reads_them(published: Path) -> None:
    described = describe(published)
    assert described.state is not None
    embedding, output = matrices(described)
    assert torch.equal(matrices(describe(published))[0], embedding)
    assert not torch.equal(matrices(describe(published, seed=8))[0], embedding)
    state: Any = described.state
    for name, whole in ((EMBEDDING, embedding), (OUTPUT, output)):
        for start, stop in ((0, 3), (TEXT_ROWS - 2, TEXT_ROWS + 2), (151_700, VOCABULARY.size)):
            part = state.part(name, dim=0, start=start, stop=stop)
            assert torch.equal(part.float(), whole[start:stop])


def test_an_import_draws_the_rows_of_a_start(published: Path, tmp_path: Path) -> None:
    rows = NewRowsConfig(policy=NewRows.normal, std=0.5)
    words = f"convert import --from {published} --out {tmp_path}/run --codebook-size 101 --seed 7"
    assert main([*words.split(), "--new-rows", "normal", "--new-rows-std", "0.5"]) == 0
    single_process_mesh()
    one, other = (build_model(MODEL, vocabulary_size=VOCABULARY.size) for _ in range(2))
    load_into([one], described=describe(tmp_path / "run"))
    load_into([other], described=describe(published, new_rows=rows))
    other.bfloat16()  # an import keeps the type of the weights
    held = weights_by_name(other)
    for name, parameter in weights_by_name(one).items():
        assert torch.equal(parameter, held[name].float()), name


def test_a_release_of_ours_starts_a_run(release: Path) -> None:
    lines: list[str] = []
    described = describe(release, message=lines.append)
    assert lines == [f"weights of the release {release}: 14 tensors"]
    single_process_mesh()
    model = build_model(MODEL, vocabulary_size=VOCABULARY.size)
    load_into([model], described=described)
    expected = build_model(MODEL, vocabulary_size=VOCABULARY.size)
    fill_from_hf(
        dict(expected.named_parameters()),
        state=load_file(release / "model.safetensors"),
        config=MODEL,
        vocabulary_size=VOCABULARY.size,
    )
    held = weights_by_name(expected)
    assert all(torch.equal(value, held[name]) for name, value in weights_by_name(model).items())


def test_it_says_what_was_taken_and_drawn(published: Path) -> None:
    lines: list[str] = []
    other = replace(MODEL, hidden_dropout=0.1)
    describe(published, config=other, message=lines.append)
    assert lines == [
        f"weights of the Qwen3 model {published}: 14 tensors",
        "vocabulary 151,936 -> 151,955: 151,643 text rows taken over, 312 rows drawn from the mean "
        "of the text rows + N(0, 0.02) with seed 7 (211 specials, 101 visual codes; the embedding "
        "of PAD is zero), 293 Qwen rows dropped",
    ]


def test_published_weights_keep_the_settings_they_were_trained_with(
    published: Path, release: Path, tmp_path: Path
) -> None:
    other = replace(MODEL, rope_theta=1e4, rms_norm_eps=1e-5)
    told = (
        r"model\.rope_theta is 1e\+06 there and 10000 here; model\.rms_norm_eps is 1e-06 there "
        r"and 1e-05 here; set model\.rope_theta=1000000\.0 model\.rms_norm_eps=1e-06"
    )
    for origin in (published, release):
        with pytest.raises(ConfigError, match=told):
            preflight(origin, tmp_path=tmp_path, model=other)
        with pytest.raises(CheckpointError, match=told):
            describe(origin, config=other)


def test_a_run_may_be_continued_with_other_settings(published: Path, tmp_path: Path) -> None:
    options = ImportOptions(source=published, out=tmp_path / "parent", tokenizer=TOKENIZER)
    import_(options, message=lambda text: None)
    other = replace(MODEL, rope_theta=1e7)
    preflight(tmp_path / "parent", tmp_path=tmp_path, model=other)
    lines: list[str] = []
    describe(tmp_path / "parent", config=other, message=lines.append)
    assert lines == [
        f"weights of step 0 of the run {tmp_path / 'parent'}",
        "the same weights compute something else here: model.rope_theta is 1e+06 there and 1e+07 "
        "here",
    ]


def test_adapters_do_not_start_from_qwen3(published: Path, release: Path, tmp_path: Path) -> None:
    preflight(release, tmp_path=tmp_path, adapter=Adapter.lora)
    with pytest.raises(ConfigError, match=r"is a Qwen3 model.*train all weights first.*or release"):
        preflight(published, tmp_path=tmp_path, adapter=Adapter.lora)


def test_fused_layers_do_not_start_from_adapters(release: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "checkpoints" / "step_00000001").mkdir(parents=True)
    stage = PretrainConfig(init_from=str(release), adapter=Adapter.lora)
    write_config(RunConfig(model=MODEL, tokenizer=TOKENIZER, stage=stage), parent)
    preflight(parent, tmp_path=tmp_path)
    with pytest.raises(ConfigError, match=r"trained adapters.*use engine\.layers=local, or export"):
        preflight(parent, tmp_path=tmp_path, engine=EngineConfig(layers=LayerSpec.te))


def test_the_launching_host_needs_no_torch() -> None:
    code = """
import sys
from emu35.checkpoint.published import start_problems
from emu35.config import RunConfig
from pathlib import Path
assert list(start_problems(Path(sys.argv[1]), run=RunConfig()))
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, "nowhere"], check=True)


def test_an_import_refuses_a_negative_deviation(published: Path, tmp_path: Path) -> None:
    words = f"convert import --from {published} --out {tmp_path}/run --new-rows-std -1"
    assert main(words.split()) == 2


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of ``config.json``."""
    path = folder / CONFIG_JSON
    content = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps(content))


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def truncate(folder: Path) -> None:
    path = shard_of(folder, "lm_head.weight")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1000])


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the shard that holds layer 0's tensors."""
    path = shard_of(folder, "model.norm.weight")
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def preflight(
    origin: Path, *, tmp_path: Path, adapter: Adapter = Adapter.none, **changes: Any
) -> None:
    """What the launching host checks."""
    shards = tmp_path / "shards"
    shards.mkdir(exist_ok=True)
    fields: dict[str, Any] = {"model": MODEL, "tokenizer": TOKENIZER}
    config = RunConfig(
        run_dir=str(tmp_path / "run"),
        data=TokenDataConfig(sources={"text": SourceConfig(path=str(shards))}),
        stage=PretrainConfig(init_from=str(origin), adapter=adapter),
        **(fields | changes),
    )
    check_inputs(config)


CHEAP: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "another family": (
        lambda folder: edit(folder, model_type="qwen2"),
        {},
        r"config\.json: model_type is 'qwen2'; only 'Emu3' and 'qwen3' can be read",
    ),
    "biases": (
        lambda folder: edit(folder, attention_bias=True),
        {},
        "attention_bias is True, but only False is supported",
    ),
    "other sizes": (
        lambda folder: None,
        {"model": replace(MODEL, num_layers=3, hidden_size=16)},
        r"stage\.init_from=.* is another model: model\.num_layers is 1 there and 3 here; "
        r"model\.hidden_size is 8 there and 16 here",
    ),
    "too few rows": (
        lambda folder: edit(folder, vocab_size=1000),
        {},
        "has 1000 embedding rows, fewer than the 151643 ids of the text table",
    ),
    "another vocabulary": (
        lambda folder: None,
        {"tokenizer": RELEASED},
        r"tokenizer\.kind=bytes, but .* use tokenizer\.kind=emu35",
    ),
    "missing shard": (
        lambda folder: shard_of(folder, "lm_head.weight").unlink(),
        {},
        r"model-0000.-of-0000.\.safetensors is missing",
    ),
    "truncated shard": (truncate, {}, r"of-0000.\.safetensors is damaged or truncated"),
    "no weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        {},
        r"holds neither model\.safetensors\.index\.json nor model\.safetensors",
    ),
    "no model at all": (
        lambda folder: (folder / CONFIG_JSON).unlink(),
        {},
        r"config\.json",
    ),
}


@pytest.mark.parametrize(("damage", "changes", "words"), CHEAP.values(), ids=CHEAP)
def test_what_cannot_be_started_from_is_refused_before_ranks_start(
    qwen3: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    changes: dict[str, Any],
    words: str,
) -> None:
    preflight(qwen3, tmp_path=tmp_path)
    damage(qwen3)
    with pytest.raises(ConfigError, match=words):
        preflight(qwen3, tmp_path=tmp_path, **changes)
    renamed = {"config" if name == "model" else name: value for name, value in changes.items()}
    with pytest.raises(Emu35Error, match=words):
        describe(qwen3, **renamed)


def test_tensors_that_are_not_those_of_the_config_are_named(qwen3: Path) -> None:
    rewrite(qwen3, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has shape \(7,\), but .*\(8,\)"
    ):
        describe(qwen3)


def test_tensors_of_a_layer_too_many_are_named(qwen3: Path) -> None:
    edit(qwen3, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* and 8 more missing"):
        describe(qwen3, config=replace(MODEL, num_layers=2))


def test_matrices_with_fewer_rows_than_the_config_says_are_named(qwen3: Path) -> None:
    edit(qwen3, vocab_size=ROWS + 64)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(151936, 8\)"):
        describe(qwen3)


def test_another_codebook_than_that_of_a_release_is_refused(release: Path, tmp_path: Path) -> None:
    larger = replace(TOKENIZER, codebook_size=102)
    with pytest.raises(ConfigError, match=r"vocab_size is 151955 there.*codebook_size=102\) has"):
        preflight(release, tmp_path=tmp_path, tokenizer=larger)
    with pytest.raises(CheckpointError, match=r"vocab_size is 151955 there"):
        describe(release, tokenizer=larger)


def test_a_flipped_bit_in_a_release_is_found(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in release.iterdir():
        if path.name != "model.safetensors":
            (copy / path.name).symlink_to(path)
    content = bytearray((release / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    preflight(copy, tmp_path=tmp_path)
    with pytest.raises(ReleaseError, match=r"model\.safetensors has another SHA-256"):
        describe(copy)


def test_a_run_of_another_model_or_without_a_checkpoint(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    write_config(RunConfig(model=LMConfig(), tokenizer=RELEASED), origin)
    with pytest.raises(ConfigError) as caught:
        preflight(origin, tmp_path=tmp_path)
    for words in (
        "holds no checkpoint yet",
        "model.hidden_size is 128 there and 8 here",
        "tokenizer.kind is bytes there and emu35 here",
        "tokenizer.codebook_size is 16 there and 101 here",
    ):
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match="is another model"):
        describe(origin)
    os.mkdir(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither a run folder"):
        describe(tmp_path / "nothing")
