"""``emu35 data inspect --run``: what is shown of a step is what the run was trained on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from looked_at import CODES, Page, scenes, write_shards
from tiny_models import tiny_lm

from emu35.cli import main
from emu35.config import (
    CheckpointConfig,
    DiDAConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TokenDataConfig,
    TokenizerConfig,
)
from emu35.config.data import Packing, SourceConfig
from emu35.config.grpo import GRPOConfig
from emu35.config.io import write_config
from emu35.config.prompts import PromptDataConfig
from emu35.data.batch import Batch
from emu35.data.loader import LOADER_FILE, TokenLoader
from emu35.data.source import Source
from emu35.stages import pretrain
from emu35.stages.data_trace import TracedStep, TraceOptions, trace
from emu35.tokens.document import Text
from emu35.tokens.vocabulary import vocabulary_of

STEPS, BATCH, ROW = 6, 4, 96


def config(folder: Path, *, run_dir: Path, stage: Any = None) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        seed=11,
        tokenizer=TokenizerConfig(codebook_size=CODES),
        model=tiny_lm(max_position_embeddings=128),
        data=TokenDataConfig(
            sequence_length=ROW,
            sources={
                "text": SourceConfig(path=str(folder / "words"), ratio=0.5),
                "scenes": SourceConfig(path=str(folder / "scenes")),
            },
            open_bins=4,
        ),
        stage=stage or PretrainConfig(steps=STEPS, global_batch_size=BATCH, validate_every=0),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=2, keep_last=5),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Batch]]]:
    """A run of six steps with checkpoints after 2, 4 and 6, and the batches it took."""
    folder = tmp_path_factory.mktemp("trace")
    write_shards(folder / "scenes", scenes(40), shard_bytes=40_000)
    write_shards(folder / "words", [[Text(f"{n} " * (5 + 9 * n))] for n in range(12)])
    run_dir = folder / "run"
    run_dir.mkdir()
    made = config(folder, run_dir=run_dir)
    write_config(made, run_dir)
    taken: list[list[Batch]] = []
    original = TokenLoader.next_step

    def next_step(loader: TokenLoader) -> list[Batch]:
        taken.append(original(loader))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLoader, "next_step", next_step)
        pretrain.run(made, run_dir=run_dir)
    assert len(taken) == STEPS
    return run_dir, taken


def rows_seen(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


def rows_said(traced: TracedStep) -> list[list[int]]:
    pad = vocabulary_of(TokenizerConfig(codebook_size=CODES)).pad
    rows: list[list[int]] = []
    for row in traced.rows:
        tokens = [pad] * ROW
        for piece in row.pieces:
            ids = piece.entry.source.words(piece.document)[0].tolist()
            tokens[piece.left : piece.right] = ids[piece.start : piece.end]
        rows.append(tokens)
    return rows


def copied(run_dir: Path, *, to: Path, keep: list[int]) -> Path:
    """The run with only the checkpoints of some steps left."""
    shutil.copytree(run_dir, to)
    for folder in (to / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) not in keep:
            shutil.rmtree(folder)
    return to


@pytest.mark.parametrize("kept", [[2, 4, 6], [6], [4], []])
def test_every_step_is_what_the_run_took_whatever_checkpoints_are_left(
    trained: tuple[Path, list[list[Batch]]], tmp_path: Path, kept: list[int]
) -> None:
    run_dir, taken = trained
    run = copied(run_dir, to=tmp_path / "run", keep=kept)
    for step in range(1, STEPS + 1):
        traced = trace(TraceOptions(run=run, step=step))
        assert rows_said(traced) == rows_seen(taken[step - 1])
        before = max((saved for saved in kept if saved < step), default=None)
        begin = "the first step" if before is None else f"the checkpoint of step {before}"
        assert f"planned again from {begin}" in traced.notes[0]
        assert any("no checkpoint says" in note for note in traced.notes) == (not kept)


def test_a_sample_is_shown_with_files_members_records_and_texts(
    trained: tuple[Path, list[list[Batch]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, taken = trained
    words = ["data", "inspect", "--run", str(run_dir), "--step", "3"]
    assert main(words) == 0
    brief = capsys.readouterr().out
    assert len(re.findall(r"^sample \d", brief, re.MULTILINE)) == BATCH
    assert "---" not in brief
    assert main([*words, "--sample", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"sample 1 (number {2 * BATCH + 1} of the run): " in printed
    assert "sample 0" not in printed
    found = re.findall(
        r"columns \[(\d+), (\d+)\)  (\w+)  (\S+\.tar)  (\d{6}-\d{6})  id (\S+)  "
        r"(whole|tokens \[\d+, \d+\)) of (\d+)",
        printed,
    )
    assert found
    row = rows_seen(taken[2])[1]
    for left, right, name, shard, member, id, tokens, length in found:
        source = Source(name=name, path=Path(shard).parent)
        number = next(n for n in range(len(source)) if source.record(n)["id"] == id)
        assert source.member(number) == member
        assert source.locate(number)[0].path == Path(shard)
        ids = source.words(number)[0].tolist()
        assert len(ids) == int(length)
        start, end = (0, len(ids)) if tokens == "whole" else map(int, tokens[8:-1].split(","))
        assert row[int(left) : int(right)] == ids[start:end]
        assert f"id {id}\n" in printed.split("---", 1)[1]


def test_a_token_is_named_with_its_document(
    trained: tuple[Path, list[list[Batch]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, taken = trained
    row = rows_seen(taken[0])[2]
    vocabulary = vocabulary_of(TokenizerConfig(codebook_size=CODES))
    words = ["data", "inspect", "--run", str(run_dir), "--step", "1", "--sample", "2"]
    code = next(at for at, id in enumerate(row) if vocabulary.is_visual(id))
    letter = next(at for at, id in enumerate(row) if 97 <= id < 123)
    for column, said in [
        (0, f"id {vocabulary.bos}, '<|extra_203|>', control; before it ''"),
        (letter, f"id {row[letter]}, '{chr(row[letter])}', text; before it '<|extra_203|>"),
        (code, "visual, in picture 0 of "),
        (code, "codes, row 0 column 0; before it"),
        (code - 1, "'<|image token|>', layout, in picture 0"),
    ]:
        assert main([*words, "--token", str(column)]) == 0
        printed = capsys.readouterr().out
        assert f"column {column} is token " in printed
        assert said in printed
        assert printed.count("\n--- ") == 1
    padding = [at for at, id in enumerate(row) if id == vocabulary.pad]
    if padding:
        assert main([*words, "--token", str(padding[0])]) == 0
        assert f"column {padding[0]} is padding" in capsys.readouterr().out


def test_the_page_of_a_sample(
    trained: tuple[Path, list[list[Batch]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = trained
    page = tmp_path / "page.html"
    words = ["data", "inspect", "--run", str(run_dir), "--step", "2", "--html", str(page)]
    assert main([*words, "--sample", "0"]) == 0
    capsys.readouterr()
    shown = Page(page)
    assert "run, step 2" in shown.text
    assert "sample 0, columns [0, " in shown.text
    assert "caption" in shown.text
    alone = shown.tags.count("article")
    assert main(words) == 0
    capsys.readouterr()
    assert Page(page).tags.count("article") > 2 * alone
    assert main([*words, "--sample", "0", "--token", "0"]) == 0
    shown = Page(page)
    assert shown.tags.count("article") == 1
    assert "column 0 is token" in shown.text


def test_damaged_checkpoints_are_passed_over_and_named(
    trained: tuple[Path, list[list[Batch]]], tmp_path: Path
) -> None:
    run_dir, taken = trained
    run = copied(run_dir, to=tmp_path / "run", keep=[2, 4])
    position = run / "checkpoints" / "step_00000004" / LOADER_FILE
    position.write_text(position.read_text().replace('"epoch": 0', '"epoch": 1', 1))
    traced = trace(TraceOptions(run=run, step=6))
    assert rows_said(traced) == rows_seen(taken[5])
    assert "checkpoint of step 2" in traced.notes[0]
    assert any("step_00000004 is passed over: loader.json has" in note for note in traced.notes)


@pytest.mark.parametrize("kept", [[2], [6]])
def test_data_that_changed_since_are_refused(
    trained: tuple[Path, list[list[Batch]]],
    tmp_path: Path,
    kept: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir, _ = trained
    run = copied(run_dir, to=tmp_path / "run", keep=kept)
    shutil.copytree(run_dir.parent / "words", tmp_path / "words")
    write_shards(tmp_path / "scenes", scenes(40, seed=1))
    write_config(config(tmp_path, run_dir=run), run)
    assert main(["data", "inspect", "--run", str(run), "--step", "3"]) == 2
    assert "shards of source 'scenes' changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage",
    [
        SFTConfig(steps=3, global_batch_size=BATCH),
        DiDAConfig(steps=3, global_batch_size=BATCH, noisy_length=16),
    ],
)
def test_fine_tuning_and_adaptation_are_traced_as_well(
    trained: tuple[Path, list[list[Batch]]], tmp_path: Path, stage: Any
) -> None:
    made = config(trained[0].parent, run_dir=tmp_path, stage=stage)
    assert isinstance(made.data, TokenDataConfig)
    made.data.packing = Packing.offline
    write_config(made, tmp_path)
    with TokenLoader(
        data=made.data,
        vocabulary=vocabulary_of(made.tokenizer),
        seed=made.seed,
        global_batch_size=BATCH,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        seen = [rows_seen(loader.next_step()) for _ in range(3)]
    for step in (1, 3):
        assert rows_said(trace(TraceOptions(run=tmp_path, step=step))) == seen[step - 1]


def test_steps_that_the_run_has_not_made_are_said_to_be_ahead(
    trained: tuple[Path, list[list[Batch]]], tmp_path: Path
) -> None:
    run = copied(trained[0], to=tmp_path / "run", keep=[2])
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 1.0}) + "\n")
    notes = trace(TraceOptions(run=run, step=5)).notes
    assert "metrics.jsonl ends at step 3; this is what step 5 gets" in notes
    assert not any("metrics" in note for note in trace(TraceOptions(run=run, step=3)).notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "the steps of this run are 1 to 6"),
        (["--step", "7"], "the steps of this run are 1 to 6"),
        (["--step", "1", "--sample", "4"], "a step of this run has samples 0 to 3"),
        (["--step", "1", "--token", "4"], "say which with --sample"),
        (["--step", "1", "--sample", "0", "--token", "96"], "has columns 0 to 95"),
    ],
)
def test_places_that_the_run_has_not_are_refused(
    trained: tuple[Path, list[list[Batch]]],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["data", "inspect", "--run", str(trained[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_runs_that_read_no_shards_and_sources_elsewhere_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "inspect", "--run", str(tmp_path), "--step", "1"]
    assert main(words) == 2
    assert "config.yaml does not exist" in capsys.readouterr().err
    made = config(Path("elsewhere"), run_dir=tmp_path)
    write_config(made, tmp_path)
    assert main(words) == 2
    assert "run this from the folder that the run was started in" in capsys.readouterr().err
    made.stage, made.data = GRPOConfig(), PromptDataConfig()
    write_config(made, tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "a run of stage=grpo on data=prompts" in error
    assert "those of pretrain, sft and dida are" in error
