"""``emu35 dida fit-path`` with a tiny image tokenizer: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_vision import write_tiny_ibq

from emu35.cli import main
from emu35.config import DiDAConfig, TokenizerConfig
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.run.compose import compose
from emu35.tokens.document import Document, Image, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.text import build_text_tokenizer
from emu35.vision.codec import weights_digest

CODES = 64


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_ibq(tmp_path_factory.mktemp("vision"), codes=CODES)


def shards(folder: Path, *, vision: Path | None, codes: list[int], codebook: int = CODES) -> Path:
    """One document with a picture of these codes in one row."""
    tokenizer = build_text_tokenizer(TokenizerConfig(codebook_size=codebook))
    meta = ShardMeta(
        source="x",
        kind="bytes",
        n_text=256,
        codebook_size=codebook,
        vision=None if vision is None else weights_digest(vision),
    )
    parts = [Text("a"), *([Image(np.array([codes]))] if codes else [])]
    with ShardWriter(folder=folder, meta=meta, shard_bytes=2**20) as writer:
        writer.append(serialize(Document(parts), tokenizer), document_id="0")
    return folder


def fit(*words: object) -> int:
    return main(["dida", "fit-path", *map(str, words)])


def test_numbers_are_printed_written_and_drawn(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "fit"
    assert fit("--vision", vision, "--out", out) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "path.json").read_text())
    assert {path.name for path in out.iterdir()} == {"path.json", "path.html"}

    # What is to be pasted configures the path that was fitted.
    pasted = yaml.safe_load(printed[printed.index("\nstage:") :].split("\n\n")[0])["stage"]["path"]
    assert pasted == {"c": found["c"], "alpha": found["alpha"]}
    stage = compose(
        ["experiment=demo/dida", *(f"stage.path.{k}={v}" for k, v in pasted.items())]
    ).stage
    assert isinstance(stage, DiDAConfig)
    assert (stage.path.c, stage.path.alpha) == (found["c"], found["alpha"])

    assert (found["usual"]["c"], found["usual"]["alpha"]) == (3.0, 0.9)
    assert found["fitted"]["deviation"] < found["usual"]["deviation"]
    for curve in (found["usual"], found["fitted"]):
        assert f"{curve['deviation']:.4f}" in printed
        assert f"{curve['distance'][len(curve['times']) // 2]:.3f}" in printed
    page = (out / "path.html").read_text()
    lines = re.findall(r'<polyline points="([^"]*)"', page)
    # Two paths and the straight line, then the unchanged codes of two paths.
    assert [len(line.split()) for line in lines] == [33, 33, 2, 33, 33]
    for curve in (found["usual"], found["fitted"]):
        assert f"(c {curve['c']:g}, alpha {curve['alpha']:g}) <b>{curve['deviation']:.4g}<" in page


def test_the_same_command_gives_the_same_files_and_overwrites_only_when_told(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--vision", vision, "--codes", 20, "--seed", 4)
    for name in ("one", "two"):
        assert fit(*words, "--out", tmp_path / name) == 0
    one = tmp_path / "one" / "path.json"
    assert one.read_bytes() == (tmp_path / "two" / "path.json").read_bytes()
    assert fit("--vision", vision, "--out", tmp_path / "one") == 2
    assert "already holds path.json and path.html" in capsys.readouterr().err
    assert json.loads(one.read_text())["codes"] == 20
    assert fit("--vision", vision, "--out", tmp_path / "one", "--force") == 0
    assert json.loads(one.read_text())["codes"] == CODES


def test_shards_weigh_the_codes(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [shards(tmp_path / str(k), vision=vision, codes=[k] * 9 + [5]) for k in (3, 60)]
    assert fit("--vision", vision, "--out", tmp_path / "few", "--shards", *few) == 0
    assert "over 3 of them, as often as they occur in the shards" in capsys.readouterr().out
    other = shards(tmp_path / "other", vision=vision, codes=[3] * 9 + [5, 60])
    assert fit("--vision", vision, "--out", tmp_path / "b", "--shards", other) == 0
    first, second = (
        json.loads((tmp_path / name / "path.json").read_text()) for name in ("few", "b")
    )
    assert first["codes"] == second["codes"] == 3
    assert first["fitted"] != second["fitted"]
    # Packed into rows, they weigh the same.
    packed = tmp_path / "packed"
    words = ["data", "pack", *map(str, few), "--out", str(packed), "--sequence-length", "64"]
    assert main(words) == 0
    assert fit("--vision", vision, "--out", tmp_path / "c", "--shards", packed) == 0
    third = json.loads((tmp_path / "c" / "path.json").read_text())
    assert (third["codes"], third["fitted"]) == (first["codes"], first["fitted"])


def test_what_does_not_fit_together_is_named(
    vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    other = write_tiny_ibq(tmp_path / "other", codes=CODES, seed=1)
    foreign = shards(tmp_path / "foreign", vision=other, codes=[1])
    wide = shards(tmp_path / "wide", vision=None, codes=[1], codebook=CODES + 1)
    texts = shards(tmp_path / "texts", vision=None, codes=[])
    for words, message in (
        (("--vision", tmp_path / "no"), f"no vision tokenizer in {tmp_path / 'no'}"),
        (("--vision", vision, "--codes", 0), "codes=0 is too small; use at least 1"),
        (("--vision", vision, "--seed", -1), "seed=-1 must lie in 0"),
        (("--vision", vision, "--out", tmp_path / "file"), "file is a file; name a folder"),
        (("--vision", vision, "--out", tmp_path / "file" / "x"), "cannot write"),
        (("--vision", vision, "--shards", tmp_path / "no"), "does not exist"),
        (("--vision", vision, "--shards", wide), f"codebook_size={CODES + 1}"),
        (("--vision", vision, "--shards", foreign), "encoded by an image tokenizer with weights"),
        (("--vision", vision, "--shards", texts), "no document has a picture"),
    ):
        out = () if "--out" in words else ("--out", tmp_path / "out")
        assert fit(*words, *out) == 2
        error = capsys.readouterr().err
        assert error.startswith("emu35: ")
        assert message in error
        assert not (tmp_path / "out").exists()
