"""``experiment=eval/tokenizer``: figures against independent ones, one rank and two, refusals."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vision import write_tiny_ibq
from torchrun_ranks import run_ranks

from emu35.cli import main
from emu35.config.io import read_config, write_config
from emu35.vision.codec import load_codec

pytest.importorskip("rapidocr", reason="needs the extra 'rewards'")
metrics = pytest.importorskip("skimage.metrics")

PICTURES, SIDES = 46, (32, 48)
CODES = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of two pixels a side of a code; pictures, one of them cut short; and a picture
    of a word with its text beside."""
    place = tmp_path_factory.mktemp("tokenizer_eval")
    for seed, name in enumerate(("first", "second")):
        write_tiny_ibq(place / name, codes=CODES, seed=seed)
    (place / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        small = rng.integers(0, 256, size=(5, 6, 3)).astype(np.uint8)
        image = Image.fromarray(small).resize((60, 48), Image.Resampling.BICUBIC)
        image.save(place / "pictures" / f"{number:02d}.png")
    whole = (place / "pictures" / "07.png").read_bytes()
    (place / "pictures" / "07.png").write_bytes(whole[: len(whole) // 2])
    return place


def evaluate(source: Path, run_dir: Path, *overrides: str) -> int:
    """The command."""
    return main(
        [
            "run",
            "experiment=eval/tokenizer",
            f"run_dir={run_dir}",
            "~stage.tokenizers.demo",
            f"stage.tokenizers.first={source / 'first'}",
            f"stage.pictures=[{source / 'pictures'}]",
            f"stage.resolutions=[{','.join(map(str, SIDES))}]",
            "stage.batch_size=7",
            "stage.text.generated=2",
            "stage.text.side=256",
            "stage.shown=2",
            "launch.threads=1",
            *overrides,
        ]
    )


@pytest.fixture(scope="module")
def done(source: Path) -> Path:
    run_dir = source / "run"
    assert evaluate(source, run_dir, f"stage.tokenizers.second={source / 'second'}") == 0
    return run_dir


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def squares(source: Path, *, side: int) -> torch.Tensor:
    """The usable pictures, cut and resized without the stage's code; uint8 [N, side, side, 3]."""
    found = []
    for path in sorted((source / "pictures").iterdir()):
        if path.name == "07.png":
            continue
        image = Image.open(path)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=(6, 0, 54, 48))
        found.append(np.asarray(image))
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["first", "second"])
def test_figures_are_those_of_an_independent_computation(
    done: Path, source: Path, name: str, side: int
) -> None:
    original = squares(source, side=side)
    codec = load_codec(source / name)
    codes = codec.encode(original.permute(0, 3, 1, 2).float() / 127.5 - 1)
    decoded = ((codec.decode(codes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pairs = list(zip(original.numpy(), decoded, strict=True))
    resolution = results(done)["resolutions"][str(side)]
    found = resolution["tokenizers"][name]
    assert resolution["pictures"] == len(pairs) == PICTURES - 1
    psnr = [metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
    assert found["psnr"] == pytest.approx(np.mean(psnr), rel=1e-3)
    assert found["spread"]["psnr"]["lowest"] == pytest.approx(min(psnr), rel=1e-3)
    ssim = [
        metrics.structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in pairs
    ]
    # In batches of another size a code here and there is rounded to another one.
    assert found["ssim"] == pytest.approx(np.mean(ssim), abs=1e-3)
    counts = np.bincount(codes.flatten().numpy(), minlength=CODES)
    shares = counts[counts > 0] / counts.sum()
    assert found["codebook_usage"] == pytest.approx((counts > 0).mean(), abs=1 / CODES)
    entropy = -(shares * np.log2(shares)).sum()
    assert found["codebook_perplexity"] == pytest.approx(2**entropy, rel=5e-3)
    assert found["bits_per_pixel"] == 6 / 4
    assert found["frechet_wavelets"] > 0


def test_text_is_measured_of_originals_and_by_height(done: Path) -> None:
    found = results(done)["resolutions"]["48"]
    assert found["tokenizers"]["first"]["counts"]["lines"] == 8
    # Large words are read off an original of 48 pixels; a random tokenizer leaves nothing.
    assert found["originals"]["text_accuracy_0.2_1"] == 1.0
    assert found["tokenizers"]["first"]["text_accuracy"] == 0.0
    assert found["tokenizers"]["first"]["text_edit_distance"] > 0.5


def test_what_cannot_be_measured_keeps_its_row(done: Path) -> None:
    missing = results(done)["resolutions"]["32"]["not_measured"]
    assert "stage.lpips.weights" in missing["lpips"]
    # With dlib installed it is that no face was found.
    assert "face" in missing["face_similarity"]
    assert {"rfid"} <= missing.keys()
    table = (done / "table.md").read_text()
    for key in ("lpips", "face_similarity", "rfid"):
        assert table.count(f"not measured: {missing[key]}") == len(SIDES)


def test_damaged_pictures_are_counted_and_named(done: Path) -> None:
    pictures = results(done)["pictures"]
    (name,) = pictures["rejected"]
    assert name.endswith("07.png")
    assert pictures["found"] == PICTURES
    assert "45 of 46 pictures; not usable: 1" in (done / "table.md").read_text()


def test_results_say_what_they_are_and_what_made_them(done: Path, source: Path) -> None:
    found = results(done)
    assert found["versions"]["torch"] == torch.__version__
    assert "not comparable" in found["labels"]["text_accuracy"]["what"]
    assert "Not FID" in found["labels"]["frechet_wavelets"]["what"]
    assert found["tokenizers"]["first"]["factor"] == 2
    digests = {facts["weights_sha256"] for facts in found["tokenizers"].values()}
    assert len(digests) == 2
    keys = found["resolutions"]["32"]["tokenizers"]["first"].keys() - {"counts", "spread"}
    assert keys == found["labels"].keys()


class Seen(HTMLParser):
    """Sources of pictures, headings, and everything that is said on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(str(dict(attrs)["src"]))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_the_page_has_every_row_and_pictures_side_by_side(done: Path) -> None:
    text = (done / "results.html").read_text(encoding="ascii")
    seen = Seen(text)
    said = "\n".join(seen.said)
    for row in results(done)["labels"].values():
        if "unknown" not in row["title"]:
            assert row["title"] in said
    # Worst, best, others and texts: two pictures each, as an original and by two tokenizers.
    assert len(seen.sources) == len(SIDES) * 4 * 2 * 3
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert "http" not in text.replace("http://www.w3.org", "")
    lowest = results(done)["resolutions"]["32"]["tokenizers"]["first"]["spread"]["psnr"]["lowest"]
    assert "Worst by PSNR, 32 pixels" in said
    assert f"PSNR {lowest:.2f} dB" in said
    assert "07.png: truncated image" in said


@pytest.mark.multiproc
def test_two_ranks_find_what_one_finds(done: Path, tmp_path: Path) -> None:
    config = read_config(done)
    config.launch.nproc = 2
    write_config(config, tmp_path)
    run_ranks(["-m", "emu35.run.worker", str(tmp_path)], ranks=2, timeout=240)
    found, wanted = results(tmp_path), results(done)
    for side in map(str, SIDES):
        for name in ("first", "second"):
            a, b = (each["resolutions"][side]["tokenizers"][name] for each in (found, wanted))
            # Sums of products are added in another order.
            assert a.pop("frechet_wavelets") == pytest.approx(b.pop("frechet_wavelets"), rel=1e-9)
    assert found == wanted
    assert (tmp_path / "table.md").read_text() == (done / "table.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage.tokenizers.first={place}/nowhere"], "nowhere is no folder"),
        (["stage.pictures=[{place}/nowhere]"], "nowhere does not exist"),
        (["stage.lpips.weights={place}/nowhere"], "stage.lpips.weights"),
        (["stage.resolutions=[33]"], "33 is not a multiple of 2, the factor of tokenizer first"),
        (["stage.resolutions=[16]"], "use at least 32 pixels"),
        (["stage.tokenizers.first={place}/pictures"], "no vision tokenizer in"),
        (["stage.pictures=[{place}/first]"], "no picture in"),
        (["stage.pictures=[{place}/pictures/07.png]"], "none of the 1 pictures"),
        (["stage.global_batch_size=4"], "use stage.batch_size"),
        (["parallel.tp=2", "launch.nproc=2"], "data-parallel only"),
        (["stage.tokenizers.originals=x"], "has the name of another column"),
        (["stage.text.heights=[0.2,0.1]"], "must rise between 0 and 1"),
        (["stage.text.heights=[0.001,0.1]"], "must lie in [0.015, 0.64]"),
        (["stage.text.heights=[0.1,0.9]"], "must lie in [0.015, 0.64]"),
        (["stage.text.heights=[0.02]"], "leave 0.45 pixels for a line of text"),
    ],
)
def test_bad_input_is_refused(
    source: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    run_dir = tmp_path / "run"
    assert evaluate(source, run_dir, *(each.format(place=source) for each in overrides)) == 2
    assert message in capfd.readouterr().err
    assert not list(run_dir.glob("results*"))


def test_nothing_is_planned_for_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=eval/tokenizer"]) == 2
    assert "trains nothing" in capsys.readouterr().err
