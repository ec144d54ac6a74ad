"""Image tokenizers of other packages: named by a folder, opened when asked, always checked."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from emu35.errors import DataError, ReleaseError
from emu35.vision.codec import (
    CodecFacts,
    codec_facts,
    codes_dtype,
    load_codec,
    read_codebook,
    weights_digest,
)
from emu35.vision.plugged import TRUST_VARIABLE, CodecTrust

MODULE = '''
"""Codes are the mean grey of blocks of four pixels a side."""
from pathlib import Path
import torch

Path(__file__).with_name("imported").touch()


class Grey:
    factor = 4
    codebook_size = 32
    fault = ""

    def __init__(self, levels):
        self.levels = levels

    def encode(self, pixels_B3HW):
        grey_BHW = torch.nn.functional.avg_pool2d(pixels_B3HW.mean(1), self.factor)
        codes_BHW = ((grey_BHW + 1) / 2 * (self.levels - 1)).round().long()
        if self.fault == "swapped":
            return codes_BHW.mT
        if self.fault == "float":
            return codes_BHW.float()
        if self.fault == "beyond":
            return codes_BHW + 32
        if self.fault == "list":
            return codes_BHW.tolist()
        return codes_BHW

    def decode(self, codes_BHW):
        if self.fault == "nan":
            return torch.full((1, 3, 8, 12), float("nan"))
        if self.fault == "grey":
            return torch.zeros(1, 1, 8, 12)
        grey_BHW = codes_BHW.float() / (self.levels - 1) * 2 - 1
        pixels_BHW = grey_BHW.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return pixels_BHW[:, None].expand(-1, 3, -1, -1)


class Full(Grey):
    codebook_KD = torch.arange(32.0)[:, None]

    def latents(self, pixels_B3HW):
        return torch.nn.functional.avg_pool2d(pixels_B3HW.mean(1, keepdim=True), self.factor)


class Dies(Grey):
    def encode(self, pixels_B3HW):
        raise RuntimeError("squares alone")


class Small(Grey):
    codebook_size = 16


class Faulty(Grey):
    def __init__(self, fault):
        super().__init__(32)
        self.fault = fault


def _opens(kind):
    def open_it(*, folder, device, **arguments):
        assert device.type == "cpu"
        return kind(int((folder / "levels.txt").read_text()))
    return open_it


grey, full, small, dies = (_opens(kind) for kind in (Grey, Full, Small, Dies))
constant = 3


def faulty(*, folder, device, fault):
    return Faulty(fault)


def broken(*, folder, device):
    raise KeyError("weights")


def nothing(*, folder, device):
    return object()
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of another package, importable."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "their_codec.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "their_codec", raising=False)
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    return "their_codec"


def write_plug(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"codec": "their_codec:grey", "factor": 4, "codebook_size": 32, **changes}
    values = {name: value for name, value in values.items() if value is not None}
    (folder / "codec.yaml").write_text(yaml.safe_dump(values))
    (folder / "levels.txt").write_text("32")
    return folder


def test_a_codec_of_another_package_encodes_and_decodes(package: str, tmp_path: Path) -> None:
    codec = load_codec(write_plug(tmp_path / "codec"), trust=CodecTrust.given)
    assert (codec.factor, codec.codebook_size) == (4, 32)
    pixels_B3HW = torch.full((2, 3, 8, 12), -1.0)
    pixels_B3HW[1, :, 4:] = 1
    codes_BHW = codec.encode(pixels_B3HW)
    assert codes_BHW.dtype == torch.int64
    assert codes_BHW.tolist() == [[[0] * 3] * 2, [[0] * 3, [31] * 3]]
    assert torch.equal(codec.decode(codes_BHW), pixels_B3HW)


def test_its_code_does_not_run_unless_asked_for(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_plug(tmp_path / "codec")
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv(TRUST_VARIABLE, value)
        with pytest.raises(ReleaseError, match="give --trust-codec or set EMU35_TRUST_CODEC=1"):
            load_codec(folder)
        with pytest.raises(ReleaseError, match="nobody asked for that to be run"):
            read_codebook(folder)
    assert codec_facts(folder) == CodecFacts(factor=4, codebook_size=32, dtype="float32")
    weights_digest(folder)
    assert not (tmp_path / "site/imported").exists()
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert load_codec(folder).codebook_size == 32
    assert (tmp_path / "site/imported").exists()


def test_its_digest_is_that_of_all_its_files(package: str, tmp_path: Path) -> None:
    folder = write_plug(tmp_path / "codec", dtype="bfloat16")
    assert codes_dtype(folder) == "bfloat16"
    digests = [weights_digest(folder)]
    (folder / ".cache").touch()
    # Code in the folder itself leaves this when it is imported.
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "codec.cpython-311.pyc").write_bytes(b"compiled")
    assert weights_digest(folder) == digests[0]
    (folder / "levels.txt").write_text("16")
    digests.append(weights_digest(folder))
    write_plug(folder, dtype="float32")
    digests.append(weights_digest(folder))
    (folder / "deep").mkdir()
    (folder / "deep/weights").write_bytes(b"w")
    digests.append(weights_digest(folder))
    assert len(set(digests)) == 4


FAULTS = [
    ("swapped", r"encode gave shape \[1, 3, 2\], not \[1, 2, 3\]"),
    ("float", "encode gave torch.float32; codes are integers"),
    ("beyond", "encode gave codes from 48 to 48, but the codebook has 32 entries"),
    ("list", "encode gave list, not a torch.Tensor"),
    ("nan", "decode must give finite"),
    ("grey", r"decode gave shape \[1, 1, 8, 12\], not \[1, 3, 8, 12\]"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_a_codec_that_breaks_the_protocol_is_refused_when_it_is_opened(
    package: str, tmp_path: Path, fault: str, said: str
) -> None:
    folder = write_plug(tmp_path / "codec", codec="their_codec:faulty", arguments={"fault": fault})
    with pytest.raises(ReleaseError, match=said):
        load_codec(folder, trust=CodecTrust.given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": "their_codec:small"}, "codebook_size is 16, but codec.yaml says 32"),
        ({"factor": 8}, "factor is 4, but codec.yaml says 8"),
        ({"codec": "their_codec:nothing"}, "encode is no method; decode is no method"),
        ({"codec": "their_codec:broken"}, "cannot open .*: KeyError: 'weights'"),
        (
            {"codec": "their_codec:dies"},
            "fails on a picture of 8 x 12 pixels: RuntimeError: squares alone",
        ),
        ({"codec": "their_codec:constant"}, "has no callable 'constant'"),
        ({"codec": "no_such_codec:grey"}, "no_such_codec cannot be imported .*install its package"),
        ({"codec": "their_codec"}, "codec='their_codec' must be module:factory"),
        ({"codec": None}, "lacks codec; it must have codec, factor, codebook_size"),
        ({"weights": "w"}, "has unknown weights"),
        ({"factor": "4"}, "factor='4' must be of type int"),
        ({"codebook_size": 0}, "codebook_size=0 must be at least 1"),
    ],
)
def test_folders_that_do_not_open_say_why(
    package: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = write_plug(tmp_path / "codec", **changes)
    with pytest.raises(ReleaseError, match=said):
        load_codec(folder, trust=CodecTrust.given)


def test_what_goes_in_is_checked_too(package: str, tmp_path: Path) -> None:
    codec = load_codec(write_plug(tmp_path / "codec"), trust=CodecTrust.given)
    with pytest.raises(DataError, match="both sides must be multiples of 4"):
        codec.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(DataError, match="codes from 0 to 32, but the codebook has 32 entries"):
        codec.decode(torch.tensor([[[0, 32]]]))


def test_embeddings_are_for_codecs_that_have_them(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    grey, full = write_plug(tmp_path / "g"), write_plug(tmp_path / "f", codec="their_codec:full")
    assert read_codebook(full).shape == (32, 1)
    assert load_codec(full).latents(torch.zeros(2, 3, 8, 4)).shape == (2, 1, 2, 1)
    with pytest.raises(ReleaseError, match="has no codebook_KD, which this needs"):
        read_codebook(grey)
    with pytest.raises(DataError, match="has no method latents, which this needs"):
        load_codec(grey).latents(torch.zeros(2, 3, 8, 4))
