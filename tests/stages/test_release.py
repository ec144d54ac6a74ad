import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_lm

from emu35.checkpoint import sharded
from emu35.checkpoint.manager import CheckpointManager
from emu35.checkpoint.safetensor_files import INDEX, SafetensorFolder
from emu35.checkpoint.source import open_source
from emu35.cli import main
from emu35.config import (
    CheckpointConfig,
    Precision,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TokenizerConfig,
    TokenizerKind,
)
from emu35.config.io import read_config, write_config
from emu35.errors import CheckpointError, ReleaseError
from emu35.model.build import build_model
from emu35.model.init import initialize
from emu35.model.shapes import hf_shapes
from emu35.parallel.mesh import single_process_mesh
from emu35.stages.release import (
    ExportOptions,
    ImportOptions,
    VerifyOptions,
    export,
    import_,
    verify,
)
from emu35.tokens.template import PromptTemplate
from emu35.tokens.vocabulary import vocabulary_of

MODEL = tiny_lm(hidden_dropout=0.1, attention_dropout=0.1)
TOKENIZER = TokenizerConfig(kind=TokenizerKind.bytes, codebook_size=16)


def silent(_: str) -> None:
    return None


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    precision: Precision = Precision.fp32,
    vision: Path | None = None,
    steps: tuple[int, ...] = (3,),
    stage: type[PretrainConfig] | type[SFTConfig] = PretrainConfig,
) -> Path:
    """A run folder as training leaves it, with weights that were never trained."""
    folder.mkdir(parents=True)
    tokenizer = TokenizerConfig(
        kind=TOKENIZER.kind,
        codebook_size=TOKENIZER.codebook_size,
        vision=str(vision) if vision else None,
    )
    config = RunConfig(
        name="tiny",
        run_dir=str(folder),
        model=MODEL,
        tokenizer=tokenizer,
        stage=stage(precision=precision),
    )
    write_config(config, folder)
    single_process_mesh()
    vocabulary = vocabulary_of(tokenizer)
    model = build_model(MODEL, vocabulary_size=vocabulary.size, precision=precision)
    manager = CheckpointManager(
        root=folder / "checkpoints",
        config=CheckpointConfig(keep_last=5),
        identity={},
        message=silent,
    )
    for step in steps:
        initialize(model, seed=seed + step, pad_id=vocabulary.pad)
        with torch.no_grad():
            dict(model.named_parameters())["decoder.final_layernorm.weight"].uniform_(0.5, 1.5)
        manager.save(
            step,
            write=lambda place: sharded.save(place, chunks=[model], optimizer=None),
            extra={"step": step, "tokens": 10 * step},
        )
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    (folder / "config.yaml").write_text("n_embed: 16\n")
    (folder / "model.ckpt").write_bytes(b"weights of the image tokenizer")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vision: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", vision=vision, steps=(3, 6))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("releases") / "rel"
    return export(ExportOptions(run=run, out=out), message=silent)


@pytest.fixture
def release(tmp_path: Path, released: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(released, tmp_path / "copy"))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_release_holds_the_official_files_and_fields(released: Path) -> None:
    vocabulary = vocabulary_of(TOKENIZER)
    config = json.loads((released / "config.json").read_text())
    assert config["model_type"] == "Emu3"
    assert config["architectures"] == ["Emu3ForCausalLM"]
    assert config["vocab_size"] == vocabulary.size
    assert (config["head_dim"], config["hidden_size"], config["num_key_value_heads"]) == (16, 32, 2)
    assert config["tie_word_embeddings"] is False
    for name in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof"):
        assert config[f"{name}_token_id"] == getattr(vocabulary, name)
    weights = SafetensorFolder(released)
    assert weights.shapes == hf_shapes(MODEL, vocabulary_size=vocabulary.size)
    assert weights.dtype is torch.float32
    facts = json.loads((released / "emu35.json").read_text())
    assert facts["tokenizer"] == {"kind": "bytes", "codebook_size": 16}
    assert facts["prompt_template"] == "plain"
    assert facts["origin"] == {"name": "tiny", "step": 6}
    assert {name: entry["sha256"] for name, entry in facts["files"].items()} == {
        name: digest for name, digest in digests(released).items() if name != "emu35.json"
    }
    assert {"vision_tokenizer/model.ckpt", "generation_config.json", INDEX} <= set(facts["files"])


def test_no_machine_path_reaches_a_release(released: Path) -> None:
    for path in released.rglob("*.json"):
        assert "/tmp" not in path.read_text()
        assert str(released.parent) not in path.read_text()


def test_release_and_run_are_the_same_model(run: Path, released: Path) -> None:
    lines: list[str] = []
    checks = verify(VerifyOptions(release=released, against=run), message=lines.append)
    assert all(check.passed for check in checks)
    names = {check.name for check in checks}
    assert {"files", "config", "tensors", "architecture", "vision", "weights", "logits"} <= names
    assert any("exactly equal" in line for line in lines)


def test_opened_sources_agree(run: Path, released: Path, vision: Path) -> None:
    from_run, from_release = (
        open_source(run, message=silent),
        open_source(released, message=silent),
    )
    ours, theirs = from_run.model.state_dict(), from_release.model.state_dict()
    for name, tensor in from_run.model.named_parameters():
        assert torch.equal(tensor, theirs[name]), name
    assert ours.keys() == theirs.keys()
    assert from_run.config == from_release.config == MODEL
    assert from_run.tokenizer.vocabulary == from_release.tokenizer.vocabulary
    assert from_run.template is from_release.template is PromptTemplate.plain
    assert from_run.vision_folder == vision
    assert from_release.vision_folder == released / "vision_tokenizer"
    assert not from_run.model.training


def test_a_certain_step_can_be_released(run: Path, released: Path, tmp_path: Path) -> None:
    out = export(ExportOptions(run=run, out=tmp_path / "rel", step=3), message=silent)
    assert json.loads((out / "emu35.json").read_text())["origin"]["step"] == 3
    with pytest.raises(ReleaseError, match=r"weights: .* differ.*logits: differ by up to"):
        verify(VerifyOptions(release=out, against=run), message=silent)
    verify(VerifyOptions(release=out, against=run, step=3), message=silent)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .*3, 6"):
        export(ExportOptions(run=run, out=tmp_path / "none", step=4), message=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rel"]


def test_verification_for_programs_says_what_was_compared(
    run: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "verify", "--against", str(run), "--json", "--release"]
    assert main([*command, str(released)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["passed"] is True
    assert found["logits_equal"] is True
    assert found["max_difference"] == 0
    shapes = hf_shapes(MODEL, vocabulary_size=vocabulary_of(TOKENIZER).size)
    assert (found["tensors_compared"], found["tensors_different"]) == (len(shapes), 0)
    assert found["logits_compared"] == 2 * 64 * vocabulary_of(TOKENIZER).size
    assert "exactly equal" in captured.err

    other = export(ExportOptions(run=run, out=tmp_path / "rel", step=3), message=silent)
    assert main([*command, str(other)]) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["passed"], found["logits_equal"]) == (False, False)
    assert found["max_difference"] > 0
    assert found["tensors_different"] > 0
    assert "logits: differ by up to" in captured.err

    assert main([*command, str(released), "--probe-tokens", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["logits_equal"] is None


@pytest.mark.parametrize("precision", Precision)
def test_export_import_export_is_byte_equal(
    tmp_path: Path, vision: Path, precision: Precision
) -> None:
    run = make_run(tmp_path / "run", precision=precision, vision=vision)
    first = export(
        ExportOptions(run=run, out=tmp_path / "a", max_shard_bytes=40_000), message=silent
    )
    imported = import_(ImportOptions(source=first, out=tmp_path / "b"), message=silent)
    shutil.rmtree(run)
    second = export(
        ExportOptions(run=imported, out=tmp_path / "c", max_shard_bytes=40_000), message=silent
    )
    assert len(list(first.glob("*.safetensors"))) > 1
    assert digests(first) == digests(second)
    config = read_config(imported)
    assert config.model == MODEL
    assert config.stage.precision is precision
    verify(VerifyOptions(release=second, against=imported), message=silent)


def test_fp32_run_released_as_bf16(run: Path, tmp_path: Path) -> None:
    out = export(ExportOptions(run=run, out=tmp_path / "rel", dtype=Precision.bf16), message=silent)
    assert SafetensorFolder(out).dtype is torch.bfloat16
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    verify(VerifyOptions(release=out, against=run), message=silent)


def test_fine_tuned_runs_are_prompted_in_the_official_form(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stage=SFTConfig)
    lines: list[str] = []
    out = export(ExportOptions(run=run, out=tmp_path / "rel"), message=lines.append)
    assert open_source(out, message=silent).template is PromptTemplate.official
    assert any("no image tokenizer" in line for line in lines)
    plain = ExportOptions(run=run, out=tmp_path / "plain", template=PromptTemplate.plain)
    assert open_source(export(plain, message=silent)).template is PromptTemplate.plain


def test_a_folder_with_content_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for action in (
        lambda: export(ExportOptions(run=run, out=tmp_path), message=silent),
        lambda: import_(ImportOptions(source=run, out=tmp_path), message=silent),
        lambda: export(ExportOptions(run=run, out=tmp_path / "notes.txt"), message=silent),
    ):
        with pytest.raises(ReleaseError, match=r"is not empty|is a file"):
            action()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", vision=tmp_path / "nowhere")
    with pytest.raises(ReleaseError, match=r"nowhere is no image tokenizer.*tokenizer\.vision"):
        export(ExportOptions(run=run, out=tmp_path / "rel"), message=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_export_left_is_no_obstacle(run: Path, tmp_path: Path) -> None:
    (tmp_path / ".tmp-rel").mkdir()
    (tmp_path / ".tmp-rel" / "stale").write_text("half")
    out = export(ExportOptions(run=run, out=tmp_path / "rel"), message=silent)
    verify(VerifyOptions(release=out, against=run), message=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["rel"]


def test_a_full_disk_is_named_and_nothing_stays(run: Path, released: Path, tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small filesystem is not permitted here")
    try:
        with pytest.raises(ReleaseError, match=r"cannot write .*they need \d+,\d+ bytes"):
            export(ExportOptions(run=run, out=tmp_path / "rel"), message=silent)
        with pytest.raises(CheckpointError, match=r"cannot save .* has [\d,]+ bytes free"):
            import_(ImportOptions(source=released, out=tmp_path / "run"), message=silent)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_every_damaged_file_is_named(released: Path, tmp_path: Path) -> None:
    names = [name for name in digests(released) if name != "emu35.json"]
    assert len(names) >= 7
    for name in names:
        folder = Path(shutil.copytree(released, tmp_path / "r"))
        flip(folder / name)
        with pytest.raises(ReleaseError, match=name.replace(".", r"\.")):
            verify(VerifyOptions(release=folder, probe_tokens=0), message=silent)
        with pytest.raises(ReleaseError, match=name.replace(".", r"\.")):
            import_(ImportOptions(source=folder, out=tmp_path / "out"), message=silent)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(folder)


def test_an_unlisted_file_is_noticed(release: Path) -> None:
    (release / "pytorch_model.bin").write_bytes(b"surprise")
    with pytest.raises(ReleaseError, match=r"pytorch_model\.bin is not listed"):
        verify(VerifyOptions(release=release, probe_tokens=0), message=silent)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("head_dim"), "no head_dim"),
        (lambda c: c.update(num_hidden_layers=3), "layers.2"),
        (lambda c: c.update(num_hidden_layers=10**12), "only 25 tensors"),
        (lambda c: c.update(num_hidden_layers="2"), "num_hidden_layers is '2', not a number"),
        (lambda c: c.update(hidden_size=-1), "hidden_size=-1"),
        (lambda c: c.update(vocab_size=7), "vocab_size=7"),
        (lambda c: c.update(model_type="llama"), "model_type is 'llama'"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (lambda c: c.update(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
        (lambda c: c.update(bos_token_id=1), "bos_token_id is 1"),
        (lambda c: c.pop("img_token_id"), "no img_token_id"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is True"),
    ],
)
def test_a_config_that_lies_is_refused(
    release: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_json(release / "config.json", change)
    with pytest.raises(ReleaseError, match=message.replace(".", r"\.")):
        verify(VerifyOptions(release=release, probe_tokens=0), message=silent)


def test_missing_and_unknown_tensors_are_named(release: Path) -> None:
    tensors = dict(SafetensorFolder(release))
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    del tensors["model.norm.weight"]
    save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    (release / INDEX).unlink()
    (release / "emu35.json").unlink()
    with pytest.raises(ReleaseError, match=r"model\.norm\.weight is missing; .*bias is unknown"):
        verify(VerifyOptions(release=release), message=silent)


def test_facts_cannot_lead_outside(release: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["files"]["../../etc/passwd"] = {"size": 1, "sha256": ""}

    edit_json(release / "emu35.json", change)
    with pytest.raises(ReleaseError, match="not a path inside the folder"):
        open_source(release, message=silent)


def test_a_folder_of_neither_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        open_source(tmp_path, message=silent)


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=())
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        open_source(run, message=silent)


def test_a_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(3, 6))
    newest = run / "checkpoints" / "step_00000006"
    victim = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    lines: list[str] = []
    assert open_source(run, message=lines.append).described.step == 3
    assert victim.name in lines[0]


def test_logits_equal_those_of_transformers(released: Path) -> None:
    """Same weights in Qwen3ForCausalLM, whose architecture this is: an independent computation."""
    transformers = pytest.importorskip("transformers")
    source = open_source(released, message=silent)
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=source.tokenizer.vocabulary.size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.ffn_hidden_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_attention_heads,
            num_key_value_heads=MODEL.num_kv_heads,
            head_dim=MODEL.head_dim,
            rms_norm_eps=MODEL.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(dict(SafetensorFolder(released)), strict=True)
    tokens_BS = torch.arange(40).view(2, 20) * 13 % source.tokenizer.vocabulary.size
    expected_BSV = theirs(tokens_BS).logits
    logits_BSV = full_logits(source.model, tokens_BS=tokens_BS)
    assert logits_BSV.shape == expected_BSV.shape
    assert (logits_BSV - expected_BSV).abs().max().item() < 1e-5
    checks = verify(
        VerifyOptions(release=released, transformers=True, probe_tokens=0), message=silent
    )
    assert "transformers" in {check.name for check in checks}


def full_logits(model: Any, *, tokens_BS: torch.Tensor) -> torch.Tensor:
    from emu35.model.context import AttentionContext
    from emu35.model.logits import vocabulary_logits
    from emu35.model.mask import AttentionMask

    batch, length = tokens_BS.shape
    context = AttentionContext(
        positions_BS=torch.arange(length).expand(batch, length),
        mask=AttentionMask.causal(torch.zeros_like(tokens_BS)),
    )
    hidden_SBH = model(tokens_BS, context=context)
    logits_NV = vocabulary_logits(model, hidden_NH=hidden_SBH.transpose(0, 1).flatten(0, 1))
    return logits_NV.view(batch, length, -1)
