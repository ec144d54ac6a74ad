"""``emu35 data tokenize`` with a real, tiny image tokenizer, and with one of another package."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from tiny_vision import write_tiny_ibq

from emu35.cli import main
from emu35.stages import data as data_stage
from emu35.vision.codec import load_codec, weights_digest
from emu35.vision.ibq.folder import read_folder, write_folder
from emu35.vision.ibq.hf_folder import write_hf_folder
from emu35.vision.plugged import TRUST_VARIABLE
from emu35.vision.resize import open_image, to_pixels

AREA = 16 * 16


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """Factor 2, 64 codes."""
    return write_tiny_ibq(tmp_path / "vision", codes=64)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(40, 40), (80, 40), (30, 60), (44, 44)]):
        pixels = rng.integers(0, 255, (height // 10, width // 10, 3)).astype(np.uint8)
        Pictures.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def codes_in(out: Path) -> dict[str, np.ndarray]:
    """Id of each picture and its codes."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m) for m in tar}
            members = {name: file.read() for name, file in files.items() if file is not None}
        for name in members:
            if name.endswith(".codes.npy"):
                facts = json.loads(members[name.replace("codes.npy", "json")])
                found[facts["tokenized"]["id"]] = np.load(io.BytesIO(members[name]))
    return found


def run(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def test_codes_are_those_of_the_tokenizer_and_the_use_of_its_codebook_is_told(
    photos: Path, vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("tokenize", photos, "--vision", vision, "--out", out, "--area", "16x16") == 0
    found = codes_in(out)
    codec = load_codec(vision)
    for name, codes in found.items():
        pixels = torch.from_numpy(to_pixels(open_image(photos / name), area=AREA, factor=2))
        np.testing.assert_array_equal(codes, codec.encode(pixels[None])[0].numpy())
    assert {codes.shape for codes in found.values()} == {(8, 8), (6, 11), (11, 6)}
    together = np.concatenate([codes.flatten() for codes in found.values()])
    used = len(np.unique(together))
    assert used > 1
    printed = capsys.readouterr().out
    assert f"4 pictures, {len(together)} codes, 1 tars" in printed
    assert f"{used} of 64 codes used ({used / 64:.1%})" in printed
    report = json.loads((out / "usage.json").read_text())
    assert report["used"] == used
    np.testing.assert_array_equal(np.load(out / "usage.npy"), np.bincount(together, minlength=64))


def test_of_equally_near_codes_the_lowest_is_taken(
    photos: Path, vision: Path, tmp_path: Path
) -> None:
    """Every embedding is there twice, so every code has an equal 32 above it."""
    model = read_folder(vision)
    with torch.no_grad():
        model.quantize.codebook_KD[32:] = model.quantize.codebook_KD[:32]
    write_folder(model, folder=tmp_path / "twice")
    out = tmp_path / "out"
    run("tokenize", photos, "--vision", tmp_path / "twice", "--out", out, "--area", "16x16")
    counts = np.load(out / "usage.npy")
    assert counts[:32].sum() > 0
    assert counts[32:].sum() == 0


def test_documents_of_codes_need_no_network(
    photos: Path,
    vision: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf = tmp_path / "hf"
    write_hf_folder(read_folder(vision), folder=hf, digest=weights_digest(vision))
    common = ["--area", "16x16", "--codebook-size", 64, "--source", "demo"]
    run("tokenize", photos, "--vision", vision, "--out", tmp_path / "codes", "--area", "16x16")
    assert run("ingest", photos, "--vision", vision, "--out", tmp_path / "a", *common) == 0

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(data_stage, "load_codec", refuse)
    # The same weights in another layout are the same tokenizer.
    assert run("ingest", tmp_path / "codes", "--vision", hf, "--out", tmp_path / "b", *common) == 0
    for name in ("demo-000000.tar", "demo-000000.idx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    capsys.readouterr()
    codebook = [*common[:2], "--codebook-size", 128]
    codes = tmp_path / "codes"
    assert run("ingest", codes, "--vision", hf, "--out", tmp_path / "c", *codebook) == 2
    assert "one of 64; " in capsys.readouterr().err
    other = write_tiny_ibq(tmp_path / "other", codes=64, seed=1)
    assert run("ingest", codes, "--vision", other, "--out", tmp_path / "d", *common) == 2
    assert "Give the tokenizer that made the codes" in capsys.readouterr().err


def test_folders_that_are_no_tokenizer_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tokenize", photos, "--vision", photos, "--out", tmp_path / "out") == 2
    assert "no vision tokenizer in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


MODULE = """
import torch

class Mean:
    factor, codebook_size = 8, 16

    def encode(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels.mean(1), 8)
        return ((mean + 1) * 7.5).round().long()

    def decode(self, codes):
        pixels = codes.repeat_interleave(8, 1).repeat_interleave(8, 2) / 7.5 - 1
        return pixels[:, None].expand(-1, 3, -1, -1)

def open_mean(*, folder, device):
    return Mean()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_of_another_package_encodes_when_it_is_trusted(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    place = tmp_path / "site"
    place.mkdir()
    (place / "mean_codec.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "mean_codec", raising=False)
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    vision = tmp_path / "mean"
    vision.mkdir()
    (vision / "codec.yaml").write_text(
        "{codec: 'mean_codec:open_mean', factor: 8, codebook_size: 16, dtype: bfloat16}"
    )
    # A second input, so that two workers have something to do.
    (tmp_path / "more").mkdir()
    Pictures.new("RGB", (32, 32), "white").save(tmp_path / "more/white.png")
    out = tmp_path / "out"
    command = ["tokenize", photos, tmp_path / "more", "--vision", vision, "--out", out]
    command += ["--area", "16x16", "--workers", workers]
    assert run(*command) == 2
    assert "nobody asked for that to be run" in capsys.readouterr().err
    assert run(*command, "--trust-codec") == 0
    found = codes_in(out)
    assert len(found) == 5
    assert (found["white.png"] == 15).all()
    assert json.loads((out / "usage.json").read_text())["codebook_size"] == 16
    shards = ["--area", "16x16", "--codebook-size", 16, "--max-rejects", 1]
    assert run("ingest", out, "--vision", vision, "--out", tmp_path / "tokens", *shards) == 0
    assert run("stats", tmp_path / "tokens") == 0
    assert "computed in bfloat16" in capsys.readouterr().out
