"""The tokenizer as the rest of emu35 uses it, and the folder it lives in."""

import pickle
import subprocess
import sys

import pytest
import torch
import yaml

from emu35.config import IBQConfig
from emu35.errors import DataError, ReleaseError
from emu35.vision.codec import load_codec, read_codebook
from emu35.vision.ibq import codec as ibq_codec
from emu35.vision.ibq.folder import read_config, read_folder, write_folder
from emu35.vision.ibq.model import IBQ

CONFIG = {
    "ch": 32,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "resolution": 32,
    "z_channels": 16,
    "embed_dim": 8,
    "n_embed": 64,
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    write_folder(IBQ(IBQConfig(**CONFIG)), folder=tmp_path / "vision_tokenizer")
    return tmp_path / "vision_tokenizer"


def test_codec_reports_its_geometry_and_makes_grids(folder):
    codec = load_codec(folder)
    assert (codec.factor, codec.codebook_size) == (4, 64)
    codes_BHW = codec.encode(torch.rand(3, 3, 8, 12) * 2 - 1)
    assert codes_BHW.shape == (3, 2, 3)
    pixels_B3HW = codec.decode(codes_BHW)
    assert pixels_B3HW.shape == (3, 3, 8, 12)
    assert pixels_B3HW.min() >= -1
    assert pixels_B3HW.max() <= 1
    assert not pixels_B3HW.requires_grad


def test_opening_one_takes_up_no_compiler(folder):
    """Every process that makes or shows pictures would start a second later."""
    code = (
        "import sys; from pathlib import Path; from emu35.vision.codec import load_codec; "
        f"load_codec(Path({str(folder)!r})); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False"], done.stderr


def test_a_code_is_the_nearest_to_its_latent_vector(folder, monkeypatch):
    codec = load_codec(folder)
    pixels_B3HW = torch.rand(3, 3, 8, 12) * 2 - 1
    latents_BDHW = codec.latents(pixels_B3HW)
    assert latents_BDHW.shape == (3, CONFIG["embed_dim"], 2, 3)
    products_BKHW = torch.einsum("bdhw,kd->bkhw", latents_BDHW, read_codebook(folder))
    assert torch.equal(products_BKHW.argmax(1), codec.encode(pixels_B3HW))
    monkeypatch.setattr(ibq_codec, "BATCH_PIXELS", 1)
    assert torch.allclose(codec.latents(pixels_B3HW), latents_BDHW, atol=1e-6)
    with pytest.raises(DataError, match="multiples of 4"):
        codec.latents(pixels_B3HW[..., :7])


def test_cutting_a_batch_changes_nothing(folder, monkeypatch):
    codec = load_codec(folder)
    pixels_B3HW = torch.rand(5, 3, 8, 8) * 2 - 1
    whole = codec.encode(pixels_B3HW)
    decoded = codec.decode(whole)
    monkeypatch.setattr(ibq_codec, "BATCH_PIXELS", 2 * 64)
    assert torch.equal(codec.encode(pixels_B3HW), whole)
    torch.testing.assert_close(codec.decode(whole), decoded)


def test_autocast_around_the_codec_does_not_flip_codes(folder):
    codec = load_codec(folder)
    pixels_B3HW = torch.rand(8, 3, 16, 16) * 2 - 1
    expected = codec.encode(pixels_B3HW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(pixels_B3HW), expected)


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 0, 8), (1, 3, 2, 8), (3, 8, 8)])
def test_pictures_that_do_not_fit_the_grid_are_refused(folder, shape):
    with pytest.raises(DataError, match=r"multiples of 4|\[B, 3, H, W\]"):
        load_codec(folder).encode(torch.zeros(shape))


@pytest.mark.parametrize("name", ["quant_conv.bias", "quantize.embedding.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_tokenizer_gives_no_codes(folder, name, value):
    """Every comparison with NaN is false, so the nearest code would always be the first."""
    edit_weights(folder, lambda state: state[name].view(-1)[-1:].fill_(value))
    with pytest.raises(DataError, match=r"vision_tokenizer diverged: its (latents|codebook) must"):
        load_codec(folder).encode(torch.rand(1, 3, 8, 8) * 2 - 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_codebook_is_refused_by_who_reads_it_alone(folder, value):
    name = "quantize.embedding.weight"
    assert read_codebook(folder).shape == read_folder(folder).quantize.codebook_KD.shape
    edit_weights(folder, lambda state: state[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ReleaseError, match="holds NaN or infinity: the tokenizer diverged"):
        read_codebook(folder)
    edit_weights(folder, lambda state: state.pop(name))
    with pytest.raises(ReleaseError, match="is missing"):
        read_codebook(folder)


def test_codes_of_another_tokenizer_are_refused(folder):
    with pytest.raises(DataError, match="64 entries"):
        load_codec(folder).decode(torch.tensor([[[0, 64]]]))


def test_folder_round_trip_is_exact(folder, tmp_path):
    model = read_folder(folder)
    write_folder(model, folder=tmp_path / "again")
    again = read_folder(tmp_path / "again").state_dict()
    assert model.config == IBQConfig(**CONFIG)
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert (folder / "config.yaml").read_bytes() == (tmp_path / "again/config.yaml").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.ckpt"]


def test_official_code_finds_what_it_needs(folder):
    """Its loader passes the file as keyword arguments and has double_z true by default."""
    values = yaml.safe_load((folder / "config.yaml").read_text())
    assert values["ddconfig"]["double_z"] is False
    assert values["use_entropy_loss"] is False
    assert (values["n_embed"], values["embed_dim"]) == (64, 8)
    state = torch.load(folder / "model.ckpt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert state["quantize.embedding.weight"].dtype == torch.float32


def edit_weights(folder, change):
    state = torch.load(folder / "model.ckpt", weights_only=True)
    change(state)
    torch.save(state, folder / "model.ckpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("quant_conv.bias"), "lacks quant_conv.bias"),
        (lambda s: s.update(loss=torch.zeros(1)), "has unknown loss"),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(9)}),
            r"quant_conv.bias is \[9\], not \[8\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, said):
    edit_weights(folder, change)
    with pytest.raises(ReleaseError, match=said):
        read_folder(folder)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickled_code_is_not_executed(folder, capsys):
    (folder / "model.ckpt").write_bytes(pickle.dumps({"quant_conv.bias": Malicious()}))
    with pytest.raises(ReleaseError, match="cannot be read"):
        read_folder(folder)
    assert "executed" not in capsys.readouterr().out


def test_truncated_weights_are_reported(folder):
    data = (folder / "model.ckpt").read_bytes()
    (folder / "model.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ReleaseError, match="cannot be read"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ddconfig: [", "not YAML"),
        ("- 1", "ddconfig"),
        ("ddconfig: {ch: 32}", "lacks ch_mult"),
        ("ddconfig: {double_z: true}", "double_z"),
    ],
)
def test_configs_that_are_no_tokenizer_are_refused(folder, text, said):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ReleaseError, match=said):
        read_config(folder)


def test_wrong_types_and_impossible_sizes_are_refused(folder):
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["n_embed"] = "many"
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ReleaseError, match="n_embed='many' must be of type int"):
        read_config(folder)
    values["n_embed"], values["ddconfig"]["ch"] = 64, 20
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ReleaseError, match="norm_groups=32"):
        read_config(folder)


def test_missing_folder_and_missing_weights_are_reported(folder, tmp_path):
    with pytest.raises(ReleaseError, match="no vision tokenizer"):
        load_codec(tmp_path / "nowhere")
    (folder / "model.ckpt").unlink()
    with pytest.raises(ReleaseError, match="is missing"):
        load_codec(folder)


def test_failed_write_leaves_the_previous_weights(folder, monkeypatch):
    before = (folder / "model.ckpt").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ReleaseError, match="No space left"):
        write_folder(IBQ(IBQConfig(**CONFIG)), folder=folder)
    assert (folder / "model.ckpt").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.ckpt"]
