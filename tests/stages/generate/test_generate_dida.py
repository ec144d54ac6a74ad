"""``emu35 generate --decoder dida``: from runs of stage=dida and from their releases."""

import json
from pathlib import Path

import pytest
from tiny_source import options, rows, write_run

from emu35.checkpoint.source import describe
from emu35.cli import main
from emu35.config import Adapter, DiDAConfig, LoRAConfig, PathConfig, PathKind
from emu35.dida.samplers import Sampler
from emu35.errors import ConfigError
from emu35.inference.denoiser import needed_denoiser
from emu35.inference.request import Decoder, DenoiseOptions, Request
from emu35.stages.generate.run import generate
from emu35.stages.release import ExportOptions, ImportOptions, export, import_
from emu35.stages.serve.options import ServeOptions
from emu35.stages.serve.server import engine_maker


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage=dida with a path of its own numbers, in the plain form of prompts."""
    stage = DiDAConfig(path=PathConfig(c=2.0, alpha=1.1), responses_only=False)
    return write_run(tmp_path_factory.mktemp("adapted"), stage=stage)


def test_a_run_and_its_release_decode_in_parallel_alike(adapted: Path, tmp_path: Path) -> None:
    asked = {"decoder": Decoder.dida, "denoise_steps": 4}
    result = generate(options(adapted, tmp_path / "run", **asked))
    assert result.images == 3
    assert not result.problems
    assert all(answer.tokens[-2].denoised for answer in result.answers)
    release = export(ExportOptions(run=adapted, out=tmp_path / "release"))
    assert json.loads((release / "emu35.json").read_text())["noise"] == {
        "kind": "metric",
        "c": 2.0,
        "alpha": 1.1,
    }
    again = generate(options(release, tmp_path / "again", **asked))
    assert [answer.ids for answer in again.answers] == [answer.ids for answer in result.answers]
    imported = import_(ImportOptions(source=release, out=tmp_path / "imported"))
    back = generate(options(imported, tmp_path / "back", **asked))
    assert [answer.ids for answer in back.answers] == [answer.ids for answer in result.answers]
    plain = generate(options(release, tmp_path / "plain"))
    assert [answer.ids for answer in plain.answers] != [answer.ids for answer in again.answers]


def test_each_record_chooses_its_decoder(adapted: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "a cat", "seed": 1},
        {"prompt": "a cat", "seed": 1, "decoder": "dida", "denoise_steps": 3},
        {"prompt": "a cat", "seed": 1, "decoder": "dida", "sampler": "maskgit"},
    ]
    file.write_text("\n".join(json.dumps(record) for record in records))
    mixed = generate(
        options(adapted, tmp_path / "mixed", prompts=(), prompts_file=file, logprobs=True)
    )
    assert [sum(row["denoised"]) for row in rows(tmp_path / "mixed")] == [0, 12, 12]
    denoised = [sum(token.denoised for token in answer.tokens) for answer in mixed.answers]
    assert denoised == [0, 12, 12]
    file.write_text(json.dumps(records[1]))
    alone = generate(options(adapted, tmp_path / "alone", prompts=(), prompts_file=file))
    assert alone.answers[0].ids == mixed.answers[1].ids
    file.write_text(json.dumps({"prompt": "a cat", "sampler": "euler"}))
    with pytest.raises(ConfigError, match="must be one of kinetic_euler, entropy_bound"):
        generate(options(adapted, tmp_path / "wrong", prompts=(), prompts_file=file))


def test_a_source_that_was_not_adapted_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not adapted to parallel decoding; use a run or a rel"):
        generate(options(run, tmp_path / "out", decoder=Decoder.dida))
    with pytest.raises(ConfigError, match="sampler hold for parallel decoding, but decoder is ar"):
        generate(options(run, tmp_path / "out", denoise_steps=3, sampler=Sampler.remdm))
    with pytest.raises(ConfigError, match=r"denoise steps=0 must lie in 1\.\.1000"):
        generate(options(run, tmp_path / "out", decoder=Decoder.dida, denoise_steps=0))


def test_adapters_of_noisy_copies_leave_token_by_token_as_it_was(run: Path, tmp_path: Path) -> None:
    stage = DiDAConfig(
        path=PathConfig(kind=PathKind.mixture_uniform),
        responses_only=False,
        adapter=Adapter.lora_noisy_only,
        lora=LoRAConfig(rank=4, alpha=8.0),
    )
    adapted = write_run(tmp_path / "adapted", stage=stage)
    full = write_run(
        tmp_path / "full",
        stage=DiDAConfig(path=PathConfig(kind=PathKind.mixture_uniform), responses_only=False),
    )
    answers = {
        (name, decoder): [
            answer.ids
            for answer in generate(
                options(source, tmp_path / f"{name}_{decoder}", decoder=decoder, logprobs=True)
            ).answers
        ]
        for name, source in (("adapted", adapted), ("full", full))
        for decoder in Decoder
    }
    assert answers["adapted", Decoder.ar] == answers["full", Decoder.ar]
    logprobs = [
        [row["logprobs"] for row in rows(tmp_path / f"{name}_ar")] for name in ("adapted", "full")
    ]
    assert logprobs[0] == logprobs[1], "bit for bit"
    assert answers["adapted", Decoder.dida] != answers["full", Decoder.dida]


def test_the_command_line(adapted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ["generate", "--run", str(adapted), "--prompt", "a cat", "--size", "3x4"]
    chosen = ["--decoder", "dida", "--denoise-steps", "2", "--sampler", "entropy_bound"]
    assert main([*call, *chosen, "--out", str(out)]) == 0
    assert len(rows(out)) == 1


def test_a_server_without_the_codebook_answers_token_by_token(
    adapted: Path, tmp_path: Path
) -> None:
    described = describe(adapted, step=None, message=print)
    nowhere = tmp_path / "nowhere"
    engine = engine_maker(ServeOptions(source=adapted, vision=nowhere), described=described)()
    prompt = [engine.vocabulary.bos]
    engine.submit(Request(prompt=prompt, max_new_tokens=4))
    (answer,) = engine.run()
    assert answer.tokens
    with pytest.raises(ConfigError, match=r"image tokenizer is not there.*decoder ar"):
        engine.submit(Request(prompt=prompt, denoise=DenoiseOptions()))
    with pytest.raises(ConfigError, match=r"nowhere is not there; give its folder.*--vision"):
        needed_denoiser(described, chosen=nowhere)


def test_how_steps_are_spread_and_how_long_they_are_guided(adapted: Path, tmp_path: Path) -> None:
    """On the command line and in records: guidance that ends at once is none, and steps near the
    noise give another picture."""
    call = ["generate", "--run", str(adapted), "--size", "3x4", "--decoder", "dida", "--logprobs"]
    call += ["--prompt", "a cat", "--denoise-steps", "6"]

    def ids(name: str, *words: str) -> list[int]:
        assert main([*call, *words, "--out", str(tmp_path / name)]) == 0
        (row,) = rows(tmp_path / name)
        return row["ids"]

    guided = ids("guided", "--guidance", "3")
    plain = ids("plain", "--guidance", "1")
    assert guided != plain
    assert ids("at_once", "--guidance", "3", "--guidance-until", "0") == plain
    whole = ids("whole", "--guidance", "3", "--guidance-until", "1")
    shifted = ids("shifted", "--guidance", "3", "--denoise-shift", "4")
    assert shifted != guided
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "a cat", "seed": 0, "denoise_shift": 4},
        {"prompt": "a cat", "seed": 0, "guidance_until": 1},
        {"prompt": "a cat", "seed": 0},
    ]
    file.write_text("\n".join(json.dumps(record) for record in records))
    asked = {"decoder": Decoder.dida, "denoise_steps": 6, "prompts": (), "prompts_file": file}
    found = generate(options(adapted, tmp_path / "records", **asked))
    assert [answer.ids for answer in found.answers] == [shifted, whole, guided]


def test_numbers_of_denoising_that_make_no_sense_are_refused(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "--run", str(adapted), "--prompt", "a cat", "--out", str(tmp_path / "out")]
    assert main([*call, "--denoise-shift", "2", "--guidance-until", "0.5"]) == 2
    assert "denoise_shift and guidance_until hold for parallel decoding" in capsys.readouterr().err
    wrong = ["--decoder", "dida", "--denoise-shift", "0", "--guidance-until", "1.5"]
    assert main([*call, *wrong]) == 2
    said = capsys.readouterr().err
    assert "denoise shift=0.0 must be positive and at most 100" in said
    assert "guidance_until=1.5 is a time and must lie in 0..1" in said
