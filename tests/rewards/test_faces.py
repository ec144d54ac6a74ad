"""Faces are counted, cut out and recognised."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx_models import POINTS, write_embedder, write_model, write_yunet
from PIL import Image
from reward_samples import numbers, sample, words

from emu35.config.reward_local import FacesRewardConfig, IdentityRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.face_detector import ARCFACE_52, FaceDetector
from emu35.rewards.faces import FacesReward
from emu35.rewards.identity import IdentityReward
from emu35.rewards.sample import Picture, Score, Unscored

pytest.importorskip("cv2", reason="needs the extra 'rewards'")
pytest.importorskip("onnxruntime", reason="needs the extra 'rewards'")
data = pytest.importorskip("skimage.data", reason="needs the extra 'rewards'")


def person(number: int, *, side: int = 270) -> Picture:
    """A portrait of scikit-image's hundred (of Labeled Faces in the Wild), enlarged."""
    grey = np.pad((data.lfw_subset()[number] * 255).astype(np.uint8), 10, mode="edge")
    image = Image.fromarray(grey).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def beside(*pictures: Picture) -> Picture:
    return np.concatenate(pictures, axis=1)


ASTRONAUT: Picture = data.astronaut()[::2, ::2]


@pytest.fixture(scope="module")
def faces() -> FacesReward:
    return FacesReward(FacesRewardConfig())


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_embedder(tmp_path_factory.mktemp("faces") / "embedder.onnx"))


@pytest.fixture(scope="module")
def identity(embedder: str) -> IdentityReward:
    return IdentityReward(IdentityRewardConfig(embedder=embedder))


def test_faces_are_counted_with_opencvs_own_cascade(faces: FacesReward) -> None:
    two = beside(ASTRONAUT, ASTRONAUT[:, ::-1])
    small = np.asarray(Image.fromarray(ASTRONAUT).resize((96, 96)))
    nobody = words("BUS", side=128)
    thread, dot = np.zeros((1, 3000, 3), dtype=np.uint8), np.zeros((1, 1, 3), dtype=np.uint8)
    asked = [
        sample(thread, dot, faces=0),
        sample(ASTRONAUT, faces=1),
        sample(small, faces=1),
        sample(two, faces=2),
        sample(two, faces=1),
        sample(ASTRONAUT, faces=3),
        sample(nobody, faces=0),
        sample(nobody, faces=2),
        sample(ASTRONAUT, nobody, faces=1),
    ]
    assert numbers(faces, *asked) == pytest.approx([1, 1, 1, 1, 0.5, 1 / 3, 1, 0, 0.5])
    (score,) = faces.score([sample(faces=1)])
    assert isinstance(score, Unscored)


def test_faces_smaller_than_asked_for_are_not_seen() -> None:
    wide = beside(ASTRONAUT, np.zeros_like(ASTRONAUT))
    strict = FacesReward(FacesRewardConfig(smallest=0.5))
    assert numbers(strict, sample(wide, faces=0)) == [1]


@pytest.mark.parametrize(
    ("record", "message"),
    [({}, "number of faces"), ({"faces": -1}, "0 or more"), ({"faces": True}, "whole number")],
)
def test_a_record_without_a_count_is_told_beforehand(
    faces: FacesReward, record: dict[str, object], message: str
) -> None:
    (problem,) = faces.problems(record)
    assert message in problem
    assert faces.problems({"faces": 0}) == []


def test_many_threads_count_what_one_does(faces: FacesReward) -> None:
    samples = [sample(person(number, side=128), faces=1) for number in range(8)]

    def one(index: int) -> Score:
        return faces.score([samples[index]])[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(8))) == list(faces.score(samples))


def test_the_same_people_are_known_again_and_others_are_not(identity: IdentityReward) -> None:
    one, other = person(0), person(1)
    noise = np.random.default_rng(0).integers(-12, 13, one.shape)
    again = np.clip(one + noise, 0, 255).astype(np.uint8)
    same, stranger, swapped, lost, nobody = numbers(
        identity,
        sample(again, references=(one,)),
        sample(other, references=(one,)),
        sample(beside(other, again), references=(one, other)),
        sample(again, references=(one, other)),
        sample(words("BUS"), references=(one,)),
    )
    assert same > 0.95
    assert stranger < same - 0.2
    assert swapped > 0.9
    assert lost == pytest.approx(same / 2, abs=0.05)
    assert nobody == 0
    no_picture, no_face = identity.score(
        [sample(references=(one,)), sample(one, references=(words("BUS"),))]
    )
    assert isinstance(no_picture, Unscored)
    assert isinstance(no_face, Unscored)
    assert "no face is found in the question" in no_face.reason
    assert identity.problems({})
    assert identity.problems({"images": ["a.png"]}) == []


def test_yunet_says_where_eyes_and_mouth_are_and_faces_are_turned_upright(tmp_path: Path) -> None:
    path = write_yunet(tmp_path / "yunet.onnx")
    detector = FaceDetector(FacesRewardConfig(detector=str(path), side=256))
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    # A cell of 32 pixels once the picture is enlarged twice: column 3, row 2.
    picture[32:48, 48:64] = (255, 0, 0)
    (face,) = detector.faces(picture)
    assert face.box == pytest.approx((40, 24, 32, 32), abs=0.5)
    assert face.points_52 is not None
    expected = [(48 + 16 * x, 32 + 16 * y) for x, y in POINTS]
    assert face.points_52 == pytest.approx(np.array(expected), abs=0.5)
    assert detector.faces(np.zeros((1, 300, 3), dtype=np.uint8)) == []
    marked = picture.copy()
    for x, y in face.points_52.round().astype(int)[:2]:
        marked[y - 1 : y + 2, x - 1 : x + 2] = 255
    upright = detector.cut(marked, face, side=112)
    eyes = ARCFACE_52[:2].round().astype(int)
    assert all(upright[y, x].min() > 120 for x, y in eyes), "the eyes are where ArcFace wants them"
    assert np.median(upright[:, :, 1]) < 60


def test_colour_order_and_scale_of_the_embedder_are_as_configured(embedder: str) -> None:
    red = np.zeros((112, 112, 3), dtype=np.uint8)
    red[:, :, 0] = 255
    vectors = {
        order: IdentityReward(IdentityRewardConfig(embedder=embedder, channels=order))
        for order in ("rgb", "bgr")
    }
    first = {order: reward._embedder(red).reshape(3, -1) for order, reward in vectors.items()}
    assert (first["rgb"][0] > 0).all()
    assert (first["rgb"][1:] < 0).all()
    assert (first["bgr"][2] > 0).all()
    assert (first["bgr"][:2] < 0).all()


def test_models_that_are_none_are_refused_by_name(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"junk\.onnx"):
        FacesReward(FacesRewardConfig(detector=str(junk)))
    with pytest.raises(ConfigError, match="there is no detector"):
        FacesReward(FacesRewardConfig(detector="gone.onnx"))
    with pytest.raises(ConfigError, match=r"junk\.onnx cannot be opened"):
        IdentityReward(IdentityRewardConfig(embedder=str(junk)))
    with pytest.raises(ConfigError, match="there is no embedder"):
        IdentityReward(IdentityRewardConfig(embedder="gone.onnx"))
    wide = write_model(
        tmp_path / "wide.onnx",
        nodes=[],
        inputs={"data": (1, 1, 8, 4)},
        outputs={"data": (1, 1, 8, 4)},
    )
    with pytest.raises(ConfigError, match="an embedder takes one"):
        IdentityReward(IdentityRewardConfig(embedder=str(wide)))
    assert any("embedder is empty" in problem for problem in IdentityRewardConfig().problems("id"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"emu35\[rewards\]"):
        FacesReward(FacesRewardConfig())
