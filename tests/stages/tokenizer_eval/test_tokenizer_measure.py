"""Measures with tokenizers whose losses are known, and without packages."""

import io
import sys
import tarfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_models import write_embedder
from PIL import Image
from random_lpips import random_lpips

from emu35.config.tokenizer_eval import (
    FaceEvalConfig,
    Fid,
    LpipsConfig,
    TextEvalConfig,
    TokenizerEvalConfig,
)
from emu35.data.scenes.lines import render_lines
from emu35.errors import ConfigError, DataError
from emu35.stages import picture_features
from emu35.stages.tokenizer_eval import instruments
from emu35.stages.tokenizer_eval.gallery import batches
from emu35.stages.tokenizer_eval.inputs import missing_inputs
from emu35.stages.tokenizer_eval.instruments import Group, open_instruments
from emu35.stages.tokenizer_eval.measure import Resolution, Subject, measure, reconstruct
from emu35.stages.tokenizer_eval.page import choose, choose_texts
from emu35.stages.tokenizer_eval.records import Findings, PictureFigures
from emu35.stages.tokenizer_eval.report import Evaluation, notes, table_text
from emu35.stages.tokenizer_eval.stage import sections_of
from emu35.stages.tokenizer_eval.summary import Summaries, summarise
from emu35.stages.tokenizer_eval.writing import TextSet
from emu35.vision.lpips import Backbone
from emu35.vision.pictures import Rejects, find_pictures

CPU = torch.device("cpu")


class GreyCodec:
    """A code is the grey level of a pixel in steps of ``step``: exact for grey pictures at 1."""

    def __init__(self, *, step: int = 1) -> None:
        self.step = step

    factor = 1
    codebook_size = 256

    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        levels = ((pixels_B3HW.mean(1) + 1) * 127.5).round().long()
        return levels // self.step * self.step

    def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
        return (codes_BHW[:, None] / 127.5 - 1).expand(-1, 3, -1, -1)

    def latents(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        return pixels_B3HW


def subject_of(stage: TokenizerEvalConfig, **codecs: GreyCodec) -> Subject:
    rejects = Rejects()
    texts = stage.text.pictures
    return Subject(
        stage=stage,
        codecs=codecs,
        instruments=open_instruments(stage, device=CPU),
        files=find_pictures(stage.pictures, rejects=rejects),
        texts=TextSet(
            config=stage.text,
            files=find_pictures(texts, rejects=rejects) if texts else [],
            seed=0,
        ),
        rejects=rejects,
        device=CPU,
    )


def measured(subject: Subject, *, side: int) -> tuple[Resolution, Summaries]:
    found = measure(subject, side=side, tick=lambda pictures: None)
    return found, summarise(
        found,
        factors={name: codec.factor for name, codec in subject.codecs.items()},
        bounds=subject.stage.text.heights,
        missing=subject.instruments.missing,
    )


def write_greys(folder: Path, *, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, size=(6, 6)).astype(np.uint8))
        small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def test_an_exact_tokenizer_loses_nothing_and_that_is_said(tmp_path: Path) -> None:
    torch.save(dict(random_lpips(Backbone.alexnet)), tmp_path / "lpips.pt")
    stage = TokenizerEvalConfig(
        pictures=[str(write_greys(tmp_path / "greys", count=50))],
        text=TextEvalConfig(generated=0),
        lpips=LpipsConfig(weights=str(tmp_path / "lpips.pt")),
    )
    subject = subject_of(stage, exact=GreyCodec(), coarse=GreyCodec(step=32))
    found, summary = measured(subject, side=40)
    exact, coarse = (summary.tokenizers[name] for name in ("exact", "coarse"))
    assert exact.figures["psnr"] == pytest.approx(100)
    assert exact.figures["ssim"] == pytest.approx(1)
    assert exact.figures["lpips"] == pytest.approx(0, abs=1e-6)
    assert exact.figures["frechet_wavelets"] == pytest.approx(0, abs=1e-6)
    assert exact.counts["psnr_capped"] == 50
    assert coarse.counts["psnr_capped"] == 0
    assert coarse.counts["codes_used"] == 8
    for key in ("psnr", "ssim"):
        assert (coarse.figures[key] or 0) < (exact.figures[key] or 0)
    for key in ("lpips", "frechet_wavelets"):
        assert (coarse.figures[key] or 0) > 1e-4
    evaluation = Evaluation(
        tokenizers={},
        resolutions=[summary],
        found=50,
        rejected={},
        versions={},
        settings={"lpips_backbone": "alexnet", "face_embedder": "dlib"},
        bounds=stage.text.heights,
    )
    assert "whose PSNR counts as 100 dB: exact at 40 pixels: 50." in notes(evaluation)[0]
    assert "100.00" in table_text(evaluation)
    assert [len(choice.numbers) for choice in choose(found, shown=20)] == [20, 20, 10]


def test_too_few_pictures_have_no_distance_and_that_is_said(tmp_path: Path) -> None:
    stage = TokenizerEvalConfig(
        pictures=[str(write_greys(tmp_path / "greys", count=3))], text=TextEvalConfig(generated=0)
    )
    _, summary = measured(subject_of(stage, exact=GreyCodec()), side=64)
    assert summary.enlarged == 3
    assert summary.tokenizers["exact"].figures["frechet_wavelets"] is None
    assert summary.missing["frechet_wavelets"].startswith("3 pictures are too few")
    assert summary.missing["text_accuracy"] == "stage.text has no pictures"


class Flattened(torch.nn.Module):
    """In the place of a network with weights that cannot be shipped: 2048 numbers of a picture."""

    def __init__(self, name: str, features: list[str]) -> None:
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048"])

    def forward(self, levels_B3HW: torch.Tensor) -> tuple[torch.Tensor]:
        assert levels_B3HW.dtype is torch.uint8
        return (levels_B3HW.float().flatten(1)[:, :2048],)


def test_inception_is_used_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = types.ModuleType("torch_fidelity")
    package.__spec__ = ModuleSpec("torch_fidelity", loader=None)
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Flattened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    stage = TokenizerEvalConfig(
        pictures=[str(write_greys(tmp_path / "greys", count=3))], text=TextEvalConfig(generated=0)
    )
    found, summary = measured(subject_of(stage, exact=GreyCodec()), side=32)
    assert summary.missing["rfid"] == (
        "3 pictures are too few for a distance in 2048 dimensions; needs at least 2049"
    )
    own, original = (
        each.moments["inception"].sum_D for each in (found.tokenizers["exact"], found.originals)
    )
    assert original.any()
    np.testing.assert_array_equal(own, original)


def test_text_beside_pictures_in_folders_and_tars_is_what_stands_there(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    image, lines = render_lines(0, side=256, heights=[0.2, 0.12], seed=0)
    stream = io.BytesIO()
    image.convert("L").save(stream, format="PNG")
    said = "\n".join(line.text for line in lines)
    members = {"one.png": stream.getvalue(), "one.txt": said.encode(), "two.png": b"no picture"}
    folder = tmp_path / "texts"
    folder.mkdir()
    with tarfile.open(folder / "in.tar", "w") as tar:
        for name, content in members.items():
            (folder / name).write_bytes(content)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "one.txt").write_text("zzzz")  # what a file says counts, not what is read
    stage = TokenizerEvalConfig(
        pictures=[str(write_greys(tmp_path / "greys", count=1))],
        text=TextEvalConfig(generated=1, pictures=[str(folder)], heights=[0.15], side=256),
    )
    subject = subject_of(stage, exact=GreyCodec())
    found, summary = measured(subject, side=256)
    by_picture = {
        subject.texts.load(number, side=256, rejects=Rejects()).name: [  # type: ignore[union-attr]
            (line.wanted, line.distance, line.height is None)
            for line in found.tokenizers["exact"].lines
            if line.picture == number
        ]
        for number in {line.picture for line in found.originals.lines}
    }
    (tarred,) = [value for name, value in by_picture.items() if name.endswith("!one.png")]
    assert tarred == [(line.text, 0.0, False) for line in lines]
    (plain,) = [value for name, value in by_picture.items() if name.endswith("texts/one.png")]
    assert plain == [("zzzz", 1.0, True)]
    assert len([name for name in subject.rejects.reasons if "two.png" in name]) == 2
    figures = summary.tokenizers["exact"].figures
    assert figures["text_accuracy_unknown"] == 0.0
    assert figures["text_edit_distance_0.15_1"] == 0.0
    assert choose_texts(found, shown=1) == [3]


@pytest.mark.parametrize("network", ["cv2", "dlib"])
def test_a_face_is_itself_after_an_exact_tokenizer(tmp_path: Path, network: str) -> None:
    pytest.importorskip(network)
    data = pytest.importorskip("skimage.data")
    (tmp_path / "faces").mkdir()
    Image.fromarray(data.astronaut()).convert("L").save(tmp_path / "faces" / "face.png")
    Image.new("L", (64, 64), 90).save(tmp_path / "faces" / "nobody.png")
    embedder = str(write_embedder(tmp_path / "face.onnx")) if network == "cv2" else None
    stage = TokenizerEvalConfig(
        pictures=[str(tmp_path / "faces")],
        text=TextEvalConfig(generated=0),
        faces=FaceEvalConfig(embedder=embedder),
    )
    subject = subject_of(stage, exact=GreyCodec(), coarse=GreyCodec(step=96))
    _, summary = measured(subject, side=256)
    exact, coarse = (summary.tokenizers[name] for name in ("exact", "coarse"))
    assert exact.counts["faces"] == coarse.counts["faces"] == 1
    assert exact.figures["face_similarity"] == pytest.approx(1)
    assert 0 < (coarse.figures["face_similarity"] or 0) < 0.99


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "find_spec", lambda name: None)
    missing = open_instruments(TokenizerEvalConfig(), device=CPU).missing
    assert "needs rapidocr and onnxruntime" in missing[Group.text]
    assert "needs dlib and its models (pip install 'emu35[faces]')" in missing[Group.faces]
    assert "needs torch-fidelity (pip install 'emu35[evaluate]')" in missing[Group.fid]
    assert "scripts/fetch_lpips.py" in missing[Group.lpips]
    named = TokenizerEvalConfig(faces=FaceEvalConfig(embedder="face.onnx"))
    missing = open_instruments(named, device=CPU).missing
    assert "needs cv2 and onnxruntime" in missing[Group.faces]
    never = TokenizerEvalConfig(fid=Fid.never)
    assert open_instruments(never, device=CPU).missing[Group.fid] == "stage.fid=never"


def test_fid_that_is_required_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_features, "find_spec", lambda name: None)
    stage = TokenizerEvalConfig(fid=Fid.required)
    (problem,) = missing_inputs(stage)
    assert "stage.fid=required needs torch-fidelity" in problem
    with pytest.raises(ConfigError, match="torch-fidelity"):
        open_instruments(stage, device=CPU)


def test_a_tokenizer_that_gives_no_picture_of_the_same_size_is_named() -> None:
    class Halving(GreyCodec):
        def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
            return super().decode(codes_BHW[:, ::2, ::2])

    class Diverged(GreyCodec):
        def decode(self, codes_BHW: torch.Tensor) -> torch.Tensor:
            return super().decode(codes_BHW) * float("nan")

    levels = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    with pytest.raises(DataError, match="tokenizer half decodes pictures of shape"):
        reconstruct(Halving(), levels, name="half", device=CPU)
    with pytest.raises(DataError, match="tokenizer nan decodes to numbers that are not finite"):
        reconstruct(Diverged(), levels, name="nan", device=CPU)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_batches_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    dealt = [batches(20, size=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    every = sorted((each for own in dealt for each in own), key=lambda each: each.start)
    assert every == batches(20, size=3, rank=0, ranks=1)
    assert [number for each in every for number in each] == list(range(20))


def test_the_worst_and_the_best_pictures_are_shown_once() -> None:
    figures = [
        PictureFigures(number=number, psnr=psnr, ssim=0.5, lpips=None, faces=())
        for number, psnr in enumerate([30.0, 10.0, 40.0, 20.0])
    ]
    found = Resolution(
        side=32,
        originals=Findings(),
        tokenizers={"a": Findings(pictures=figures)},
        enlarged=0,
    )
    assert [choice.numbers for choice in choose(found, shown=1)] == [[1], [2], [0]]
    assert [choice.numbers for choice in choose(found, shown=3)] == [[1, 3, 0], [2], []]
    assert [choice.numbers for choice in choose(found, shown=0)] == [[], [], []]


def test_text_in_a_tar_is_found_however_its_folder_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "texts.tar"
    picture = (write_greys(tmp_path / "greys", count=1) / "00.png").read_bytes()
    with tarfile.open(path, "w") as tar:
        for name, content in (("./a.png", picture), ("./a.txt", b"HELLO")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (file,) = find_pictures([str(path)], rejects=Rejects())
    texts = TextSet(config=TextEvalConfig(generated=0), files=[file], seed=0)
    found = texts.load(0, side=32, rejects=Rejects())
    assert found is not None
    assert found.truth == ["HELLO"]


def test_a_picture_that_went_away_is_left_out_of_the_page(tmp_path: Path) -> None:
    folder = write_greys(tmp_path / "greys", count=3)
    stage = TokenizerEvalConfig(pictures=[str(folder)], text=TextEvalConfig(generated=0))
    subject = subject_of(stage, exact=GreyCodec())
    found, _ = measured(subject, side=32)
    gone = min(folder.iterdir())
    gone.unlink()
    names = [
        picture.name
        for section in sections_of(found, subject=subject)
        for picture in section.pictures
    ]
    assert len(names) == 2
    assert gone.name not in " ".join(names)
    assert any(gone.name in name for name in subject.rejects.reasons)
