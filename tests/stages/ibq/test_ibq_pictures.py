"""Which pictures a tokenizer is trained on: filters, what they leave out, and what is kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_pictures import blurred, encoded, marked, texture, words, write_tar
from PIL import Image

from emu35.config import (
    Buckets,
    CheckpointConfig,
    IBQConfig,
    IBQStageConfig,
    ImageDataConfig,
    LogConfig,
    OptimConfig,
    PictureFilterConfig,
    RunConfig,
    ScorerConfig,
    TokenizerConfig,
)
from emu35.config.images import AestheticsScorerConfig, ClassifierScorerConfig, MissingScore
from emu35.config.io import write_config
from emu35.config.rules import validate
from emu35.errors import ConfigError, DataError
from emu35.stages.ibq import pictures as ibq_pictures
from emu35.stages.ibq import stage as ibq
from emu35.vision.pictures import Rejects, readers, survey
from emu35.vision.pictures.readers import PixelReader

COUNT = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Twelve pictures in a folder and a tar: 1 and 7 blurred, 2 and 8 written on, 3 and 9 small,
    4 without metadata; ``taste`` is the number of the picture."""
    folder = tmp_path_factory.mktemp("corpus")
    members = dict[str, bytes]()
    for number in range(COUNT):
        image = texture(number, width=96 + 8 * number)
        if number % 6 == 1:
            image = blurred(image)
        elif number % 6 == 2:
            image = marked(image)
        elif number % 6 == 3:
            image = image.crop((0, 0, 40, 40))
        members[f"{number:02d}.png"] = encoded(image)
        if number != 4:
            members[f"{number:02d}.json"] = words(
                clip={"taste": number}, w=image.width, h=image.height
            )
    (folder / "files").mkdir()
    for name in [name for name in members if name < "05"]:
        (folder / "files" / name).write_bytes(members.pop(name))
    write_tar(folder / "more.tar", members)
    return folder


def make_data(corpus: Path, *filters: dict, **options) -> ImageDataConfig:
    given = {"paths": [str(corpus)], "resolution": 64, "decode_threads": 2, **options}
    bounds = [PictureFilterConfig(**entry) for entry in filters]
    data = ImageDataConfig(filters=bounds, **given)
    assert not list(data.problems())
    return data


def open_in(run_dir: Path, data: ImageDataConfig, *, rejects: Rejects | None = None):
    run_dir.mkdir(exist_ok=True)
    return ibq_pictures.open_training_pictures(
        data,
        run_dir=run_dir,
        factor=8,
        seed=1,
        micro_batch_size=2,
        rejects=Rejects() if rejects is None else rejects,
    )


def numbers(pictures) -> list[int]:
    return [int(Path(file.member or file.path).stem) for file in pictures.files]


def filtered(run_dir: Path) -> dict[int, str]:
    """Number -> reason, of filtered.jsonl."""
    lines = (run_dir / "filtered.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {int(Path(row["picture"].rpartition("!")[2]).stem): row["reason"] for row in rows}


def but(*left_out: int) -> list[int]:
    return [number for number in range(COUNT) if number not in left_out]


def test_nothing_is_looked_at_without_filters(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(survey.Survey, "run", None)
    assert numbers(open_in(tmp_path / "run", make_data(corpus))) == but()
    assert not list((tmp_path / "run").iterdir())


def test_sizes_proxies_and_metadata_leave_out_what_they_should(corpus, tmp_path, capsys):
    run_dir = tmp_path / "run"
    data = make_data(
        corpus,
        {"scorer": "min_side", "min": 64},
        {"scorer": "sharpness_proxy", "min": 50},
        {"scorer": "overlay_proxy", "max": 0.03},
        {"scorer": "taste", "max": 10},
        {"scorer": "aspect", "max": 1.8},
        scorers={"taste": ScorerConfig(field="clip.taste")},
        resolution=96,
    )
    assert numbers(open_in(run_dir, data)) == [0, 5, 6]
    reasons = filtered(run_dir)
    assert sorted(reasons) == but(0, 5, 6)
    assert reasons[3] == reasons[9] == "min_side=40 is below 64"
    assert reasons[1].startswith("sharpness_proxy=")
    assert reasons[7].endswith("is below 50")
    assert reasons[2].startswith("overlay_proxy=")
    assert reasons[4] == "taste: no score, its metadata have no number 'clip.taste'"
    assert reasons[11] == "taste=11 is above 10"
    assert reasons[10] == "aspect=1.83333 is above 1.8"
    said = capsys.readouterr().out
    assert "3 of 12 pictures are used" in said
    assert "2 left out by min_side (min 64)" in said
    assert "2 left out by sharpness_proxy (min 50)" in said
    assert not (run_dir / "rejects.jsonl").exists()


def test_missing_scores_are_dropped_kept_or_refused(corpus, tmp_path):
    def data(missing: MissingScore) -> ImageDataConfig:
        return make_data(
            corpus,
            {"scorer": "taste", "min": 0, "missing": missing},
            scorers={"taste": ScorerConfig(field="clip.taste")},
        )

    assert numbers(open_in(tmp_path / "drop", data(MissingScore.drop))) == but(4)
    assert numbers(open_in(tmp_path / "keep", data(MissingScore.keep))) == but()
    with pytest.raises(DataError, match=r"04\.png: taste: no score.*missing=refuse"):
        open_in(tmp_path / "refuse", data(MissingScore.refuse))


def test_metadata_spare_reading_pictures(corpus, tmp_path, monkeypatch):
    """A model scores only what has no score beside it, and sizes come from named fields."""

    class Greenness(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return 100 + pixels.mean(dim=(2, 3))

    path = tmp_path / "green.pt"
    torch.jit.script(Greenness()).save(str(path))
    decoded, headers = list[str](), list[str]()
    read, header_size = PixelReader.read, readers.header_size

    def counting(self, files, **options):
        decoded.extend(file.name for file in files)
        return read(self, files, **options)

    monkeypatch.setattr(PixelReader, "read", counting)
    monkeypatch.setattr(
        readers, "header_size", lambda data: headers.append("") or header_size(data)
    )
    scorer = ClassifierScorerConfig(path=str(path), side=8, field="clip.taste")
    data = make_data(
        corpus,
        {"scorer": "taste", "min": 5},
        {"scorer": "width", "min": 41},
        scorers={"taste": scorer},
        width_field="w",
        height_field="h",
    )
    assert numbers(open_in(tmp_path / "run", data)) == [4, 5, 6, 7, 8, 10, 11]
    assert decoded == [str(corpus / "files" / "04.png")]
    assert len(headers) == 1


def test_scores_are_computed_once(corpus, tmp_path, monkeypatch):
    data = make_data(corpus, {"scorer": "sharpness_proxy", "min": 50})
    first = open_in(tmp_path / "run", data)
    tighter = make_data(
        corpus, {"scorer": "sharpness_proxy", "min": 60}, {"scorer": "contrast_proxy", "min": 1}
    )
    read = PixelReader.read
    seen = list[list[str]]()

    def watched(self, files, *, wanted, pool):
        seen.append(list(wanted))
        return read(self, files, wanted=wanted, pool=pool)

    monkeypatch.setattr(PixelReader, "read", watched)
    again = open_in(tmp_path / "run", data)
    assert not seen
    assert again.identity == first.identity
    open_in(tmp_path / "run", tighter)
    assert seen == [["contrast_proxy"]]
    (tmp_path / "copy").mkdir()
    for path in corpus.rglob("*.png"):
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    open_in(tmp_path / "run", make_data(tmp_path / "copy", {"scorer": "contrast_proxy", "min": 1}))
    assert len(seen) == 2


def test_runs_that_share_scores_tell_pictures_of_one_name_and_size_apart(tmp_path):
    for name, colour in (("one", "black"), ("other", "white")):
        (tmp_path / name).mkdir()
        for number in range(3):
            image = Image.new("RGB", (8, 8), colour)
            image.putpixel((0, 0), (128, 128, 128) if name == "one" else (0, 0, 0))
            image.save(tmp_path / name / f"{number}.bmp")
    shared = {"score_cache": str(tmp_path / "scores"), "resolution": 8}
    bounds = {"scorer": "contrast_proxy", "min": 20}
    assert len(open_in(tmp_path / "a", make_data(tmp_path / "other", bounds, **shared))) == 3
    with pytest.raises(DataError, match="0 of 3 pictures"):
        open_in(tmp_path / "b", make_data(tmp_path / "one", bounds, **shared))
    assert len(list((tmp_path / "scores").iterdir())) == 2
    assert not list((tmp_path / "a").iterdir())


def test_an_interrupted_survey_goes_on_where_it_was(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "PART", 5)
    data = make_data(corpus, {"scorer": "sharpness_proxy", "min": 50})
    whole = open_in(tmp_path / "whole", data)
    read, calls = PixelReader.read, list[int]()

    def failing(self, files, **options):
        calls.append(len(files))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, files, **options)

    monkeypatch.setattr(PixelReader, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        open_in(tmp_path / "run", data)
    resumed = open_in(tmp_path / "run", data)
    assert calls == [5, 5, 2, 2]
    assert resumed.identity == whole.identity
    assert filtered(tmp_path / "run") == filtered(tmp_path / "whole")
    (part, *_) = (tmp_path / "run").rglob("000001.npz")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DataError, match=r"000001\.npz cannot be read.*delete it"):
        open_in(tmp_path / "run", data)


def test_broken_pictures_are_told_apart_from_filtered_ones(corpus, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in (corpus / "files").glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "05.png").write_bytes((folder / "00.png").read_bytes()[:500])
    (folder / "06.png").write_bytes(b"no picture")
    rejects = Rejects()
    data = make_data(
        folder, {"scorer": "min_side", "min": 64}, {"scorer": "contrast_proxy", "min": 1}
    )
    assert numbers(open_in(tmp_path / "run", data, rejects=rejects)) == [0, 1, 2, 4]
    assert sorted(filtered(tmp_path / "run")) == [3]
    found = {Path(name).name: reason for name, reason in rejects.reasons.items()}
    assert found == {"05.png": "truncated image", "06.png": "not an image"}
    again = Rejects()  # from what is kept
    open_in(tmp_path / "run", data, rejects=again)
    assert again.reasons == rejects.reasons


@pytest.mark.parametrize("name", ["00.png", "04.png"])  # 00 is one that tells listings apart
def test_a_run_is_resumed_with_its_pictures_though_others_were_mended(tmp_path, name):
    folder, shared = tmp_path / "pictures", {"score_cache": str(tmp_path / "scores")}
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(encoded(texture(number)))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(len(whole)))
    data = make_data(folder, {"scorer": "contrast_proxy", "min": 1}, **shared)
    first = open_in(tmp_path / "run", data)
    (folder / name).write_bytes(whole)
    rejects = Rejects()
    resumed = open_in(tmp_path / "run", data, rejects=rejects)
    assert resumed.identity == first.identity
    assert list(rejects.reasons) == [str(folder / name)]
    assert numbers(open_in(tmp_path / "next", data)) == list(range(40))


def test_a_survey_of_mostly_broken_pictures_stops(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    (tmp_path / "good.png").write_bytes(encoded(texture(0)))
    with pytest.raises(DataError, match="12 of 13 pictures cannot be used"):
        open_in(tmp_path / "run", make_data(tmp_path, {"scorer": "width", "min": 1}))


def test_too_few_pictures_left_is_an_error_that_says_by_what(corpus, tmp_path):
    none = make_data(corpus, {"scorer": "min_side", "min": 5000})
    with pytest.raises(DataError) as error:
        open_in(tmp_path / "none", none)
    text = str(error.value)
    assert "0 of 12 pictures are used" in text
    assert "12 left out by min_side (min 5000), which saw 96 in the median" in text
    assert "loosen data.filters" in text
    few = make_data(corpus, {"scorer": "width", "min": 180}, min_kept=0.2)
    with pytest.raises(DataError, match=r"1 of 12 .*data\.min_kept=0\.2"):
        open_in(tmp_path / "few", few)


def test_aspect_buckets_take_their_sizes_from_the_survey(corpus, tmp_path):
    data = make_data(corpus, {"scorer": "min_side", "min": 64}, buckets=Buckets.aspect, flip=0.5)
    pictures = open_in(tmp_path / "run", data)
    assert numbers(pictures) == but(3, 9)
    shapes = {pictures.sample(sample).shape for sample in range(40)}
    assert len(shapes) >= 3
    for sample in range(0, 40, 2):
        assert pictures.sample(sample).shape == pictures.sample(sample + 1).shape
    resumed = open_in(tmp_path / "run", data)
    assert resumed.identity == pictures.identity
    assert np.array_equal(resumed.sample(31), pictures.sample(31))
    assert pictures.square(0).shape == (3, 64, 64)


def test_a_turned_photograph_has_the_size_that_is_seen(tmp_path):
    image = Image.new("RGB", (80, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    data = make_data(tmp_path, {"scorer": "height", "min": 80}, {"scorer": "width", "max": 40})
    assert len(open_in(tmp_path / "run", data)) == 1


def test_a_learnt_judge_of_looks_is_a_scorer(corpus, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'rewards'")
    from safetensors.torch import save_file
    from tiny_clip import write_clip

    clip = write_clip(tmp_path / "clip")
    head = tmp_path / "head.safetensors"
    torch.manual_seed(0)
    save_file({"weight": torch.randn(1, 16), "bias": torch.zeros(1)}, head)
    scorer = AestheticsScorerConfig(model=str(clip), head=str(head), side=40)
    data = make_data(corpus, {"scorer": "beauty", "min": -100}, scorers={"beauty": scorer})
    assert numbers(open_in(tmp_path / "run", data)) == but()
    (part,) = (tmp_path / "run").rglob("000000.npz")
    with np.load(part) as kept:
        scores = kept["value"]
    assert np.isfinite(scores).all()
    middle = float(np.median(scores))
    half = make_data(corpus, {"scorer": "beauty", "min": middle}, scorers={"beauty": scorer})
    assert numbers(open_in(tmp_path / "run", half)) == np.flatnonzero(scores >= middle).tolist()
    scorer.head = str(tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError, match=r"data\.scorers\.beauty: .*there is no file"):
        open_in(tmp_path / "run", data)


def steps_of(run_dir: Path) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "loss" in row}


def test_training_in_buckets_resumes_bitwise(corpus, tmp_path):
    """Four steps equal two, a stop, and two more; and other micro-batches are another order."""
    config = RunConfig(
        name="buckets",
        model=IBQConfig(
            ch=32,
            ch_mult=[1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            resolution=32,
            z_channels=16,
            embed_dim=8,
            n_embed=64,
        ),
        tokenizer=TokenizerConfig(codebook_size=64),
        data=make_data(
            corpus,
            {"scorer": "min_side", "min": 64},
            buckets=Buckets.aspect,
            flip=0.5,
            resolution=32,
            crop=24,
            validation_paths=[str(corpus / "files")],
            validation_images=2,
        ),
        stage=IBQStageConfig(
            steps=4,
            global_batch_size=4,
            micro_batch_size=2,
            validate_every=0,
            quantizer_warmup=0.25,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(every=2, keep_last=4),
        log=LogConfig(every=1),
    )
    validate(config)
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    ibq.run(config, run_dir=folders[0])
    saved = "checkpoints/step_00000002"
    shutil.copytree(folders[0] / saved, folders[1] / saved)
    ibq.run(config, run_dir=folders[1])
    whole, resumed = (
        {
            row["step"]: row
            for row in map(json.loads, path.read_text().splitlines())
            if "loss" in row
        }
        for path in (folder / "metrics.jsonl" for folder in folders)
    )
    assert sorted(whole) == [1, 2, 3, 4]
    assert sorted(resumed) == [3, 4]
    for step, row in resumed.items():
        for name in ("loss", "grad_norm", "tokens", "codebook_usage"):
            assert row[name] == whole[step][name], (step, name)
    assert whole[1]["tokens"] == pytest.approx(4 * 6 * 6, rel=0.2)
    config.stage.micro_batch_size = 1
    with pytest.raises(DataError, match="cannot be continued"):
        ibq.run(config, run_dir=folders[1])
    assert isinstance(config.data, ImageDataConfig)
    config.data.bucket_group = 2
    ibq.run(config, run_dir=folders[1])


WORKER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
from emu35.config.io import read_config
from emu35.errors import DataError
from emu35.stages.ibq.pictures import open_training_pictures
from emu35.vision.pictures import Rejects
from emu35.vision.pictures.readers import PixelReader
read, looked = PixelReader.read, []
def counted(self, files, **options):
    looked.extend(file.name for file in files)
    return read(self, files, **options)
PixelReader.read = counted
config, run_dir = read_config(Path(sys.argv[1])), Path(sys.argv[2])
pictures = open_training_pictures(
    config.data, run_dir=run_dir, factor=8, seed=1, micro_batch_size=2, rejects=Rejects()
)
found = {"identity": pictures.identity, "looked": looked}
(run_dir / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
if dist.get_rank() == 1:
    config.data.paths = config.data.paths[:1]
try:
    open_training_pictures(
        config.data, run_dir=run_dir, factor=8, seed=1, micro_batch_size=2, rejects=Rejects()
    )
except DataError as error:
    (run_dir / f"error{dist.get_rank()}.txt").write_text(str(error))
dist.destroy_process_group()
"""


@pytest.mark.multiproc
def test_ranks_share_the_work_and_know_the_same(corpus, tmp_path):
    data = make_data(
        corpus,
        {"scorer": "sharpness_proxy", "min": 50},
        buckets=Buckets.aspect,
        paths=[str(corpus / "files"), str(corpus / "more.tar")],
    )
    alone = open_in(tmp_path / "alone", data)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_config(RunConfig(data=data), tmp_path / "config.yaml")
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "worker.py")]
    command += [str(tmp_path / "config.yaml"), str(run_dir)]
    root = Path(ibq_pictures.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (json.loads((run_dir / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one["identity"] == other["identity"] == alone.identity
    assert len(one["looked"]) == len(other["looked"]) == COUNT // 2
    assert not set(one["looked"]) & set(other["looked"])
    assert filtered(run_dir) == filtered(tmp_path / "alone")
    for rank in range(2):
        assert "the ranks find different pictures" in (run_dir / f"error{rank}.txt").read_text()
