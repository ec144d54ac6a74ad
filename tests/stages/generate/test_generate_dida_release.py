"""Releases of runs that adapt noisy copies alone: adapters beside weights that are the base's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_source import options, write_run

from emu35.checkpoint.source import describe, load_model
from emu35.cli import main
from emu35.config import Adapter, DiDAConfig, LoRAConfig, LoRATarget, PathConfig, Precision
from emu35.errors import CheckpointError, Emu35Error, ReleaseError
from emu35.inference.request import Decoder
from emu35.model.lora import adapted_linears
from emu35.stages.generate.run import generate
from emu35.stages.release import (
    ExportOptions,
    ImportOptions,
    VerifyOptions,
    export,
    import_,
    verify,
)
from emu35.stages.release_verify import run_checks

WEIGHTS = "dida_adapter/model.safetensors"
LORA = LoRAConfig(
    rank=4,
    alpha=6.0,
    dropout=0.1,
    targets=[LoRATarget.linear_qkv, LoRATarget.linear_fc1, LoRATarget.linear_fc2],
)
PATH = PathConfig(c=2.0, alpha=1.1)


def silent(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = DiDAConfig(path=PATH, responses_only=False, adapter=Adapter.lora_noisy_only, lora=LORA)
    return write_run(tmp_path_factory.mktemp("adapted"), stage=stage, kv_heads=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights without adapters."""
    stage = DiDAConfig(path=PATH, responses_only=False)
    return write_run(tmp_path_factory.mktemp("base"), stage=stage, kv_heads=2)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("releases") / "rel"
    return export(ExportOptions(run=run, out=out), message=silent)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def adapters(source: Path, *, precision: Precision = Precision.fp32) -> dict[str, torch.Tensor]:
    model = load_model(describe(source, message=silent), precision=precision)
    return {name: value for name, value in model.named_parameters() if ".adapter." in name}


def test_a_release_decodes_as_the_run_does_bit_for_bit(
    run: Path, release: Path, tmp_path: Path
) -> None:
    found = describe(release)
    assert found.copy_adapters == LORA
    assert found.noise == PATH
    ours, theirs = adapters(release), adapters(run)
    assert list(ours) == list(theirs)
    assert len(ours) == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model = load_model(found, precision=Precision.fp32)
    kept = [linear.adapter for linear in adapted_linears(model).values()]
    assert all(adapter is not None and adapter.noisy_only for adapter in kept)
    assert {adapter.scale for adapter in kept if adapter is not None} == {1.5}
    answers = {}
    for source in (run, release):
        for decoder in Decoder:
            out = tmp_path / f"{source.name}_{decoder}"
            result = generate(options(source, out, decoder=decoder, logprobs=True))
            answers[source, decoder] = (out / "results.jsonl").read_bytes()
            assert result.images == 3
    for decoder in Decoder:
        assert answers[release, decoder] == answers[run, decoder]


def test_nothing_but_the_adapters_differs_from_the_release_of_the_base(
    base: Path, release: Path, tmp_path: Path
) -> None:
    plain = files(export(ExportOptions(run=base, out=tmp_path / "base"), message=silent))
    found = files(release)
    assert {name for name in found if name not in plain} == {
        WEIGHTS,
        "dida_adapter/model.safetensors.index.json",
        "dida_adapter/adapter.json",
    }
    different = {name for name in plain if plain[name] != found[name]}
    assert different == {"emu35.json"}
    facts = json.loads(found["emu35.json"])
    assert "noise" not in facts, "who does not know of adapters must not denoise without them"
    listed = {name for name in facts["files"] if name.startswith("dida_adapter/")}
    assert listed == set(found) - set(plain)


def test_names_are_those_of_adapters_of_the_official_layers(run: Path, release: Path) -> None:
    """What a tensor adds to an official weight is what ours adds to the part of it."""
    tensors = load_file(release / WEIGHTS)
    prefix = "base_model.model.model.layers.0."
    shapes = {name.removeprefix(prefix): tuple(each.shape) for name, each in tensors.items()}
    assert shapes["self_attn.q_proj.lora_A.weight"] == (4, 32)
    assert shapes["self_attn.k_proj.lora_B.weight"] == (32, 4)
    assert shapes["mlp.up_proj.lora_B.weight"] == (64, 4)
    assert shapes["mlp.down_proj.lora_A.weight"] == (4, 64)
    assert not any("o_proj" in name for name in shapes)
    assert len(shapes) == 12
    ours = adapters(run)
    b_OR = ours["decoder.layers.0.self_attention.linear_qkv.adapter.b"]
    # Two groups of a query, a key and a value head of 16.
    for at, name in enumerate(("q", "k", "v")):
        expected = torch.cat([b_OR[16 * at : 16 * (at + 1)], b_OR[48 + 16 * at : 64 + 16 * at]])
        assert torch.equal(tensors[f"{prefix}self_attn.{name}_proj.lora_B.weight"], expected)


def test_export_import_export_is_byte_equal(run: Path, release: Path, tmp_path: Path) -> None:
    imported = import_(ImportOptions(source=release, out=tmp_path / "run"), message=silent)
    found = describe(imported, message=silent)
    assert (found.copy_adapters, found.noise) == (LORA, PATH)
    back = export(ExportOptions(run=imported, out=tmp_path / "back"), message=silent)
    assert files(back) == files(release)
    again = export(ExportOptions(run=release, out=tmp_path / "again"), message=silent)
    assert files(again) == files(release)
    asked = {"decoder": Decoder.dida}
    answers = [
        [answer.ids for answer in generate(options(source, tmp_path / name, **asked)).answers]
        for name, source in (("a", run), ("b", imported))
    ]
    assert answers[0] == answers[1]


def test_another_type_rounds_both(run: Path, tmp_path: Path) -> None:
    small = ExportOptions(run=run, out=tmp_path / "small", dtype=Precision.bf16)
    release = export(small, message=silent)
    ours, theirs = adapters(release, precision=Precision.bf16), adapters(run)
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in theirs)
    verify(VerifyOptions(release=release, against=run), message=silent)


def test_verification_covers_the_adapters(
    run: Path, base: Path, release: Path, tmp_path: Path
) -> None:
    checks = {c.name: c for c in verify(VerifyOptions(release=release, against=run))}
    assert checks["adapters"].detail == "12 tensors of noisy copies, rank 4"
    assert checks["same adapters"].detail == "12 tensors of noisy copies bit-equal"
    assert main(["convert", "verify", "--release", str(release), "--against", str(release)]) == 0

    def failed(folder: Path, *, against: Path) -> set[str]:
        made = VerifyOptions(release=folder, against=against)
        return {check.name for check in run_checks(made, message=silent) if not check.passed}

    assert failed(release, against=base) == {"same adapters"}
    plain = export(ExportOptions(run=base, out=tmp_path / "plain"), message=silent)
    assert failed(plain, against=run) == {"same adapters"}
    changed = shutil.copytree(release, tmp_path / "changed")
    tensors = load_file(changed / WEIGHTS)
    name = next(name for name in tensors if "down_proj.lora_B" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, changed / WEIGHTS, metadata={"format": "pt"})
    assert failed(changed, against=run) == {"files", "same adapters"}
    (changed / "dida_adapter" / "adapter.json").write_text("{}")
    with pytest.raises(ReleaseError, match=r"adapter\.json has format None"):
        describe(changed)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": 2}, "has format 2"),
        ({"noisy_only": False}, "noisy_only=False; this version reads format 1"),
        ({"rank": 0}, r"stage\.lora\.rank=0"),
        ({"targets": ["attention"]}, "'attention' is not a valid LoRATarget"),
        ({"noise": None}, "noise is null"),
        ({"noise": {"kind": "metric", "c": -1, "alpha": 1}}, r"stage\.path\.c=-1\.0"),
    ],
)
def test_a_description_that_lies_is_refused(
    release: Path, tmp_path: Path, values: dict, words: str
) -> None:
    copy = shutil.copytree(release, tmp_path / "copy")
    place = copy / "dida_adapter" / "adapter.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | values))
    with pytest.raises(ReleaseError, match=words):
        describe(copy)


def test_tensors_that_do_not_fit_are_named(release: Path, tmp_path: Path) -> None:
    def broken(name: str, change: dict[str, torch.Tensor], *, without: str = "-") -> Emu35Error:
        copy = shutil.copytree(release, tmp_path / name)
        tensors = {
            n: t for n, t in (load_file(copy / WEIGHTS) | change).items() if without not in n
        }
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        (copy / "dida_adapter" / "model.safetensors.index.json").unlink()
        with pytest.raises(CheckpointError) as found:
            load_model(describe(copy), precision=Precision.fp32)
        return found.value

    prefix = "base_model.model.model.layers.0."
    key = f"{prefix}self_attn.k_proj.lora_A.weight"
    assert "different lora_A for self_attn.q_proj, " in str(broken("a", {key: torch.ones(4, 32)}))
    assert f"{key} has shape (3, 32)" in str(broken("b", {key: torch.ones(3, 32)}))
    assert "missing" in str(broken("c", {}, without="up_proj"))


@pytest.mark.multiproc
@pytest.mark.slow
def test_two_ranks_decode_the_release_as_one_process_does(release: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "emu35", "generate", "--release", str(release)]
    call += ["--decoder", "dida", "--size", "3x4", "--prompt", "a cat", "--prompt", "x"]
    ids = {}
    for tp in ("1", "2"):
        out = tmp_path / tp
        done = subprocess.run(
            [*call, "--tp", tp, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = (out / "results.jsonl").read_text().splitlines()
        ids[tp] = [json.loads(line)["ids"] for line in lines]
    assert ids["1"] == ids["2"]
