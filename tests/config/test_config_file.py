"""config.yaml: written, read back, compared."""

from pathlib import Path

import pytest

from emu35.config import RunConfig
from emu35.config.io import (
    config_diff,
    departures,
    may_change,
    read_config,
    run_identity,
    write_config,
)
from emu35.errors import ConfigError
from emu35.run.compose import compose


@pytest.mark.parametrize("experiment", ["demo/pretrain", "tiny/ibq_131k", "emu35_34b/sft_s2"])
def test_what_is_written_is_read_back(experiment: str, tmp_path: Path):
    config = compose([f"experiment={experiment}"])
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    assert read_config(tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_words_that_look_like_numbers_stay_words(tmp_path: Path):
    for name in ("1e3", "007", "null", "true", "a: b"):
        write_config(RunConfig(name=name, run_dir="x"), tmp_path)
        assert read_config(tmp_path).name == name


def test_a_file_edited_by_hand_is_checked_like_an_override(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("stage: {kind: sft, stpes: 3, steps: x}\noptim: {lr: 3e-4}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    first, second = caught.value.problems
    assert first == f"{file}: unknown key 'stage.stpes' in SFTConfig. Did you mean 'steps'?"
    assert second == f"{file}: stage.steps='x' is a string; expected an integer"


@pytest.mark.parametrize("content", ["[1, 2]\n", "a: [\n", "a: 1\na: 2\n"])
def test_a_file_that_is_no_configuration(content: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path)


def test_a_folder_without_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(tmp_path / "nowhere")


def test_the_difference_names_keys_and_both_values():
    base = ["experiment=demo/pretrain"]
    a, b = compose(base), compose([*base, "optim.lr=0.5", "~data.sources.text", "log.every=3"])
    assert config_diff(a, a) == []
    assert config_diff(a, b) == [
        f"data.sources.text.path: {a.data.sources['text'].path!r} -> -",  # type: ignore[attr-defined]
        f"data.sources.text.ratio: {a.data.sources['text'].ratio!r} -> -",  # type: ignore[attr-defined]
        "data.sources.text.epochs: None -> -",
        "data.sources.text.max_tokens: None -> -",
        "data.sources.text.filter: None -> -",
        "data.sources.text.packing: None -> -",
        "data.sources.text.area: None -> -",
        f"optim.lr: {a.optim.lr!r} -> 0.5",
        f"log.every: {a.log.every!r} -> 3",
    ]
    assert may_change("log.every")
    assert not may_change("optim.lr")


def test_identity_leaves_out_what_may_change():
    base = ["experiment=demo/pretrain"]
    same = [*base, "log.every=3", "run_dir=x", "name=y", "checkpoint.every=5"]
    same += ["launch.nproc=2", "parallel.tp=2"]
    assert run_identity(compose(base)) == run_identity(compose(same))
    assert run_identity(compose(base)) != run_identity(compose([*base, "seed=2"]))


def test_departures_are_only_what_was_chosen():
    chosen = ["stage=sft", "stage.steps=7", "checkpoint.keep_last=2", "data.overlong=drop"]
    lines = departures(compose(chosen))
    assert "stage.steps: 100 -> 7" in lines
    assert not any(
        line.startswith(("checkpoint", "name", "run_dir", "stage.kind")) for line in lines
    )
