"""``emu35 convert tokenizer``: from run or folder to either layout, and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_vision import write_tiny_ibq

from emu35.checkpoint.release_folder import copy_vision_tokenizer
from emu35.cli import main
from emu35.vision.codec import load_codec, weights_digest
from emu35.vision.ibq.folder import read_folder


def test_a_run_becomes_an_hf_folder_and_that_the_official_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``tmp_path/run`` stands for a run of stage=ibq, which leaves its tokenizer there."""
    vision = write_tiny_ibq(tmp_path / "run/vision_tokenizer", codes=64)
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert (
        main(
            [
                "convert",
                "tokenizer",
                "--from",
                str(tmp_path / "run"),
                "--out",
                str(hf),
                "--format",
                "hf",
            ]
        )
        == 0
    )
    assert "parameters bit-equal, same codes" in capsys.readouterr().out
    assert (
        main(
            ["convert", "tokenizer", "--from", str(hf), "--out", str(back), "--format", "official"]
        )
        == 0
    )
    assert sorted(path.name for path in hf.iterdir()) == ["config.json", "model.safetensors"]
    assert (back / "model.ckpt").read_bytes() == (vision / "model.ckpt").read_bytes()
    assert (back / "config.yaml").read_bytes() == (vision / "config.yaml").read_bytes()
    state = read_folder(vision).state_dict()
    assert all(torch.equal(t, state[n]) for n, t in load_file(hf / "model.safetensors").items())
    pixels_B3HW = torch.rand(1, 3, 12, 8) * 2 - 1
    codes = [load_codec(folder).encode(pixels_B3HW) for folder in (vision, hf, back)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])
    assert {weights_digest(folder) for folder in (hf, back)} == {weights_digest(vision)}


def test_a_release_gets_the_official_layout_of_an_hf_tokenizer(tmp_path: Path) -> None:
    vision = write_tiny_ibq(tmp_path / "vision", codes=64)
    hf = tmp_path / "hf"
    main(["convert", "tokenizer", "--from", str(vision), "--out", str(hf), "--format", "hf"])
    copy_vision_tokenizer(hf, folder=tmp_path)
    found = tmp_path / "vision_tokenizer"
    assert (found / "model.ckpt").read_bytes() == (vision / "model.ckpt").read_bytes()
    assert weights_digest(found) == weights_digest(hf)


def test_nothing_is_written_over_and_nothing_but_tokenizers_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = write_tiny_ibq(tmp_path / "vision", codes=64)
    command = ["convert", "tokenizer", "--from", str(vision), "--format", "hf", "--out"]
    assert main([*command, str(vision)]) == 2
    assert "is not empty" in capsys.readouterr().err
    (vision / "model.ckpt").write_bytes(b"")
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "cannot be read as a dictionary of tensors" in capsys.readouterr().err
    (vision / "codec.yaml").write_text("{}")
    assert main([*command, str(tmp_path / "out")]) == 2
    assert "of another package" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
