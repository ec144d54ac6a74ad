"""The folder of a tokenizer in the layout of the Hugging Face hub, and its way there and back."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_vision import write_tiny_ibq

from emu35.config import IBQConfig
from emu35.errors import DataError, ReleaseError
from emu35.vision.codec import codec_facts, load_codec, read_codebook, weights_digest
from emu35.vision.ibq.folder import Layout, layout_of, read_config, read_folder, write_folder
from emu35.vision.ibq.hf_folder import HF_CONFIG, HF_WEIGHTS, write_hf_folder
from emu35.vision.ibq.model import IBQ


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return write_tiny_ibq(tmp_path / "official", codes=64)


@pytest.fixture
def hf(official: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    write_hf_folder(read_folder(official), folder=folder, digest=weights_digest(official))
    return folder


def test_it_holds_every_field_and_strictly_the_official_names(official: Path, hf: Path) -> None:
    assert sorted(path.name for path in hf.iterdir()) == [HF_CONFIG, HF_WEIGHTS]
    content = json.loads((hf / HF_CONFIG).read_text())
    assert content["model_type"] == "ibq"
    fields = asdict(read_config(official))
    del fields["kind"]
    assert {name: content[name] for name in fields} == fields
    state = torch.load(official / "model.ckpt", weights_only=True)
    found = load_file(hf / HF_WEIGHTS)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_both_layouts_give_the_same_codes_and_are_known_by_the_same_digest(
    official: Path, hf: Path, tmp_path: Path
) -> None:
    assert (layout_of(official), layout_of(hf)) == (Layout.official, Layout.hf)
    pixels_B3HW = torch.rand(2, 3, 8, 12) * 2 - 1
    codes_BHW = load_codec(official).encode(pixels_B3HW)
    assert torch.equal(load_codec(hf).encode(pixels_B3HW), codes_BHW)
    assert len(codes_BHW.unique()) > 1
    assert torch.equal(load_codec(hf).decode(codes_BHW), load_codec(official).decode(codes_BHW))
    assert torch.equal(read_codebook(hf), read_codebook(official))
    assert codec_facts(hf) == codec_facts(official)
    assert weights_digest(hf) == weights_digest(official)
    write_folder(read_folder(hf), folder=tmp_path / "back", digest=weights_digest(hf))
    assert weights_digest(tmp_path / "back") == weights_digest(official)


def test_weights_of_any_writer_keep_their_digest_through_both_layouts(
    official: Path, tmp_path: Path
) -> None:
    """The same tensors saved by other software are another file, and other shards remember it."""
    state = torch.load(official / "model.ckpt", weights_only=True)
    torch.save(dict(reversed(state.items())), official / "model.ckpt")
    known = weights_digest(official)
    write_hf_folder(read_folder(official), folder=tmp_path / "hf", digest=known)
    write_folder(read_folder(tmp_path / "hf"), folder=tmp_path / "back", digest=known)
    assert weights_digest(tmp_path / "hf") == known
    assert weights_digest(tmp_path / "back") == known
    assert (tmp_path / "back/model.ckpt").read_bytes() != (official / "model.ckpt").read_bytes()


def test_other_weights_in_the_folder_are_another_tokenizer(
    official: Path, hf: Path, tmp_path: Path
) -> None:
    known = weights_digest(official)
    state = load_file(hf / HF_WEIGHTS)
    state["quant_conv.bias"] = state["quant_conv.bias"] + 1
    save_file(state, hf / HF_WEIGHTS)
    assert weights_digest(hf) != known
    back = tmp_path / "back"
    write_folder(read_folder(official), folder=back, digest="0" * 64)
    assert weights_digest(back) == "0" * 64
    # A run of stage=ibq writes over its own folder, and knows nothing of the note.
    write_folder(IBQ(read_config(official)), folder=back)
    assert weights_digest(back) not in ("0" * 64, known)


def test_the_same_weights_are_written_as_the_same_bytes(official: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_folder(read_folder(official), folder=tmp_path / name)
    assert (tmp_path / "a/model.ckpt").read_bytes() == (tmp_path / "b/model.ckpt").read_bytes()


CHANGES: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda s: s.pop("quant_conv.bias"), "lacks quant_conv.bias"),
    (lambda s: s.update(loss=torch.zeros(1)), "has unknown loss"),
    (
        lambda s: s.update({"quant_conv.bias": torch.zeros(9)}),
        r"quant_conv.bias is \[9\], not \[8\]",
    ),
    (
        lambda s: s.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int8)}),
        "quant_conv.bias is of type torch.int8, no floating-point one",
    ),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_weights_that_do_not_fit_are_named(
    hf: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    state = load_file(hf / HF_WEIGHTS)
    change(state)
    save_file(state, hf / HF_WEIGHTS)
    with pytest.raises(ReleaseError, match=f"does not fit the config.json beside it: {said}"):
        read_folder(hf)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "has model_type None, not 'ibq'"),
        ('{"model_type": "Emu3"}', "has model_type 'Emu3', not 'ibq'"),
        ('{"model_type": "ibq", "ch": 32}', "lacks ch_mult"),
        ('{"model_type": "ibq", "l2_normalize": true}', "l2_normalize is True, but an IBQ"),
        ('{"model_type": "ibq", "resamp_with_conv": false}', "resamp_with_conv is False, but an"),
        ("\xff", "is not JSON"),
    ],
)
def test_configs_that_are_no_tokenizer_are_refused(hf: Path, text: str, said: str) -> None:
    (hf / HF_CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ReleaseError, match=said):
        read_config(hf)


@pytest.mark.parametrize("damage", ["cut", "gone", "text"])
def test_damaged_weights_are_reported(hf: Path, damage: str) -> None:
    path = hf / HF_WEIGHTS
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"weights")
    with pytest.raises(ReleaseError, match="is missing" if damage == "gone" else "is damaged"):
        load_codec(hf)
    with pytest.raises(ReleaseError, match="is missing" if damage == "gone" else "is damaged"):
        read_codebook(hf)
    if damage == "gone":
        with pytest.raises(DataError, match=r"model.safetensors is missing"):
            weights_digest(hf)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ch=st.sampled_from([4, 8]),
    ch_mult=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    n_embed=st.integers(1, 40),
    embed_dim=st.integers(1, 6),
    norm_groups=st.sampled_from([1, 2, 4]),
    attn=st.booleans(),
)
def test_every_tokenizer_survives_both_layouts(
    tmp_path: Path,
    ch: int,
    ch_mult: list[int],
    n_embed: int,
    embed_dim: int,
    norm_groups: int,
    attn: bool,
) -> None:
    config = IBQConfig(
        ch=ch,
        ch_mult=ch_mult,
        num_res_blocks=1,
        attn_resolutions=[8] if attn else [],
        resolution=8,
        z_channels=4,
        embed_dim=embed_dim,
        n_embed=n_embed,
        norm_groups=norm_groups,
    )
    model = IBQ(config)
    for folder in (tmp_path / "hf", tmp_path / "official"):
        shutil.rmtree(folder, ignore_errors=True)
    write_hf_folder(model, folder=tmp_path / "hf")
    write_folder(read_folder(tmp_path / "hf"), folder=tmp_path / "official")
    for folder in (tmp_path / "hf", tmp_path / "official"):
        again = read_folder(folder)
        assert again.config == config
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
