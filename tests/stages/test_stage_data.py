"""``emu35 data`` with a real, tiny image tokenizer: ingest, index, stats, inspect."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from tiny_vision import write_tiny_ibq

from emu35.cli import main
from emu35.config.area import Area, parse_area
from emu35.config.tokenizer import TokenizerConfig
from emu35.data.ingest.options import Existing, IngestOptions, PairOrder
from emu35.data.source import Source
from emu35.errors import ConfigError, DataError
from emu35.stages import data
from emu35.stages.data_inspect import InspectOptions, inspect
from emu35.stages.data_stats import StatsOptions, stats
from emu35.vision.codec import load_codec
from emu35.vision.resize import open_image, to_pixels

AREA = 48 * 48


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with random weights: factor 16, 64 codes."""
    return write_tiny_ibq(
        tmp_path_factory.mktemp("vision"),
        codes=64,
        ch_mult=[1, 1, 1, 1, 1],
        resolution=48,
        z_channels=16,
        embed_dim=16,
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(100, 100), (200, 100), (90, 180)]):
        pixels = rng.integers(0, 255, (height // 10, width // 10, 3)).astype(np.uint8)
        Pictures.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def options_of(
    inputs: list[Path], out: Path, *, vision: Path, codebook: int = 64, area: Area | None = None
) -> IngestOptions:
    return IngestOptions(
        inputs=inputs,
        out=out,
        source="photos",
        tokenizer=TokenizerConfig(codebook_size=codebook, vision=str(vision)),
        area=area or Area(least=AREA, most=AREA),
        order=PairOrder.image_first,
    )


def test_codes_are_those_of_the_tokenizer_and_everything_can_be_looked_at(
    photos: Path, vision: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    data.ingest(options_of([photos], out, vision=vision))
    printed = capsys.readouterr().out
    assert "3 documents" in printed
    assert "rejected" not in printed

    pixels = to_pixels(open_image(photos / "0.png"), area=AREA)
    codes = load_codec(vision).encode(torch.from_numpy(pixels)[None])[0].numpy()
    source = Source(name="photos", path=out)
    vocabulary = source.metas[0].vocabulary()
    tokens = source.words(0)[0].astype(np.int64)
    found = tokens[tokens >= vocabulary.visual_start] - vocabulary.visual_start
    np.testing.assert_array_equal(found.reshape(codes.shape), codes)

    data.index(data.IndexOptions(folders=[out], verify=True))
    assert "verified 1 shards, 3 documents" in capsys.readouterr().out

    stats(StatsOptions(folders=[out], sequence_length=128))
    printed = capsys.readouterr().out
    assert re.search(r"3 documents, \d+ tokens, 1 shards", printed)
    assert re.search(r"text \d.*visual \d.*layout \d.*control \d", printed)
    assert re.search(r"packing +\d+\.\d+% of rows of 128", printed)
    assert re.search(r"codes +of image tokenizer [0-9a-f]{12}, computed in float32", printed)
    assert source.metas[0].vision_dtype == "float32"

    pictures = tmp_path / "pictures"
    inspect(InspectOptions(folder=out, first=1, count=9, images=pictures, vision=vision))
    printed = capsys.readouterr().out
    assert "[image 2x4]picture 1" in printed
    assert "[image 4x2]picture 2" in printed
    assert "picture 0" not in printed
    sizes = [Pictures.open(io.BytesIO(p.read_bytes())).size for p in sorted(pictures.iterdir())]
    assert sizes == [(64, 32), (32, 64)]


@pytest.mark.parametrize(
    ("area", "sizes"),
    [
        ("64x64", [(64, 64), (64, 64), (96, 48)]),
        ("4096", [(64, 64), (64, 64), (96, 48)]),
        ("48x48..80x80", [(48, 48), (80, 80), (112, 64)]),
        ("..64x64", [(16, 16), (64, 64), (96, 48)]),
    ],
)
def test_pictures_keep_their_own_area_within_the_range(
    vision: Path, tmp_path: Path, area: str, sizes: list[tuple[int, int]]
) -> None:
    encoder = data.VisionPictures(folder=vision, area=parse_area(area), codebook_size=64)
    found: list[tuple[int, int]] = []
    for number, size in enumerate([(16, 16), (200, 200), (200, 100)]):
        path = tmp_path / f"{number}.png"
        Pictures.new("RGB", size).save(path)
        found.append(encoder.prepare(path).size)
    assert found == sizes


def test_codes_do_not_depend_on_the_batch_or_on_what_training_asked_for(vision: Path) -> None:
    encoder = data.VisionPictures(folder=vision, area=parse_area("64x64"), codebook_size=64)
    rng = np.random.default_rng(0)
    pictures = [
        Pictures.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)) for _ in range(16)
    ]
    together = encoder.encode(pictures)
    alone = [encoder.encode([picture])[0] for picture in pictures]
    # Sums of a convolution may be taken in another order, so a code on the border of two may flip.
    flipped = sum(int((a != b).sum()) for a, b in zip(together, alone, strict=True))
    assert flipped <= 0.001 * sum(codes.size for codes in alone)
    assert len({codes.tobytes() for codes in together}) > 1
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower = encoder.encode(pictures)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(2)
        threaded = encoder.encode(pictures)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
    for found in (lower, threaded):
        for codes, wanted in zip(found, together, strict=True):
            np.testing.assert_array_equal(codes, wanted)


@pytest.mark.slow
def test_workers_give_the_shards_of_one_process(photos: Path, vision: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in photos.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    shards: list[bytes] = []
    for workers in (1, 2):
        options = options_of([photos, other], tmp_path / f"out{workers}", vision=vision)
        options.workers = workers
        data.ingest(options)
        shards.append(b"".join(p.read_bytes() for p in sorted(options.out.glob("*.tar"))))
    assert shards[0] == shards[1]


RECIPE = """\
# @package _global_
defaults:
  - demo/pretrain
  - _self_
tokenizer: {{codebook_size: 64, vision: {vision}}}
data:
  sequence_length: 128
  sources:
    text: {{path: shards/train, area: 32x32..64x64}}
  validation:
    text: {{path: shards/validation, area: ..32x32}}
    held_out: {{path: shards/held_out}}
"""


def test_a_recipe_says_how_its_sources_are_ingested_and_what_is_given_wins(
    photos: Path,
    vision: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    recipe = tmp_path / "mine" / "experiment" / "photos.yaml"
    recipe.write_text(RECIPE.format(vision=vision))
    record = {"task": "x2i", "prompt": "x", "references": ["0.png"], "image": "1.png"}
    chat = {"task": "chat", "prompt": "x", "answer": "y"}
    (photos / "t.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(chat)}\n")
    words = ["data", "ingest", "photos/t.jsonl", "--configs", "mine", "--recipe", "photos"]

    def identity(out: str, *more: str, says: str) -> dict[str, object]:
        assert main([*words, *more]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"recipe photos, {says}"
        return json.loads((tmp_path / out / ".ingest" / "manifest.json").read_text())["identity"]

    said = "sources.text: out shards/train, area 32x32..64x64, tokenizer bytes, sequence length 128"
    taken = identity("shards/train", "--source", "text", says=said)
    assert (taken["source"], taken["codebook_size"], taken["tokenizer"]) == ("text", 64, "bytes")
    assert (taken["area"], taken["sequence_length"]) == ("1024..4096", 128)
    meta = Source(name="text", path=tmp_path / "shards" / "train").metas[0]
    assert meta.vision == taken["vision"] is not None

    said = (
        "validation.held_out: out shards/held_out, area 512x512, tokenizer bytes, "
        "sequence length 128"
    )
    held_out = identity("shards/held_out", "--source", "held_out", says=said)
    assert held_out["area"] == 512 * 512, "where the experiment has no say, as without a recipe"
    said = (
        "validation.text: out shards/validation, area ..32x32, tokenizer bytes, sequence length 128"
    )
    other = identity("shards/validation", "--source", "validation.text", says=said)
    assert (other["source"], other["area"]) == ("text", "1..1024")
    given = ["--out", "own", "--area", "48x48", "--sequence-length", "200"]
    said = "sources.text: out own, area 48x48, tokenizer bytes, sequence length 200"
    own = identity("own", "--source", "text", *given, says=said)
    assert (own["area"], own["sequence_length"], own["codebook_size"]) == (48 * 48, 200, 64)

    for more, message in [
        ([], "--recipe photos needs --source, the name of what is ingested; it has sources: "),
        (["--source", "tekst"], "--source tekst is no source of photos; it has sources: "),
        (["--source", "sources.held_out"], "Did you mean 'held_out'?"),
    ]:
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "ingest", "photos"]) == 2
    assert "--out is not given; name the folder" in capsys.readouterr().err
    images = ["--recipe", "tiny/ibq_131k", "--source", "x"]
    assert main(["data", "ingest", "photos", *images]) == 2
    assert "experiment tiny/ibq_131k reads no token shards" in capsys.readouterr().err


def test_text_needs_no_network(
    tmp_path: Path, vision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the image tokenizer was loaded")

    monkeypatch.setattr(data, "load_codec", refuse)
    (tmp_path / "x.txt").write_text("words", encoding="utf-8")
    summary = data.ingest(options_of([tmp_path / "x.txt"], tmp_path / "out", vision=vision))
    assert summary.documents == 1


def test_a_codebook_of_another_size_is_refused(photos: Path, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"codebook_size=99, but .* use --codebook-size 64"):
        data.ingest(options_of([photos], tmp_path / "out", vision=vision, codebook=99))


def test_replacing_with_a_codebook_of_another_size_keeps_the_earlier_shards(
    photos: Path, vision: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", tmp_path / "x.txt"
    data.ingest(options_of([photos], out, vision=vision))
    before = {path.name: path.read_bytes() for path in out.glob("photos-*")}
    text.write_text("fine without pictures", encoding="utf-8")
    options = options_of([text, photos], out, vision=vision, codebook=99)
    options.existing = Existing.replace
    with pytest.raises(ConfigError, match="use --codebook-size 64"):
        data.ingest(options)
    assert {path.name: path.read_bytes() for path in out.glob("photos-*")} == before
    assert data.ingest(options_of([photos], out, vision=vision)).skipped == 1


def test_an_error_without_a_file_or_number_still_says_what_was_wrong(
    photos: Path, vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("unexpected end of stream")

    monkeypatch.setattr(data, "ingest_files", fail)
    with pytest.raises(DataError, match="unexpected end of stream"):
        data.ingest(options_of([photos], tmp_path / "out", vision=vision))


def test_a_folder_without_tokenizer_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image tokenizer"):
        data.ingest(options_of([photos], tmp_path / "out", vision=tmp_path))


def test_index_names_every_damaged_shard_and_rebuilds_what_is_lost(
    photos: Path, vision: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    data.ingest(options_of([photos], out, vision=vision))
    sidecar = out / "photos-000000.idx"
    sidecar.unlink()
    with pytest.raises(DataError, match="has no index"):
        data.index(data.IndexOptions(folders=[out], verify=True))
    data.index(data.IndexOptions(folders=[out]))
    data.index(data.IndexOptions(folders=[out], verify=True))
    shard = out / "photos-000000.tar"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    for verify in (True, False):
        with pytest.raises(DataError, match=r"photos-000000\.tar is not a complete, unaltered"):
            data.index(data.IndexOptions(folders=[out], verify=verify))


def test_inspecting_past_the_end_says_how_many_there_are(
    photos: Path, vision: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    data.ingest(options_of([photos], out, vision=vision))
    with pytest.raises(DataError, match="no document 3; it has 3, counted from 0"):
        inspect(InspectOptions(folder=out, first=3))


def test_an_output_path_that_cannot_be_made_is_a_clear_error(
    photos: Path, vision: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"file/out.*Not a directory; check the path"):
        data.ingest(options_of([photos], tmp_path / "file" / "out", vision=vision))
