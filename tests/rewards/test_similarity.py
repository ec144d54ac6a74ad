"""Rewards from a CLIP or SigLIP in a folder, here a tiny one with random weights."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_samples import sample, words
from safetensors.torch import save_file

from emu35.config.reward_local import AestheticsModelRewardConfig, SimilarityRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.aesthetics_model import AestheticsModelReward
from emu35.rewards.image_text import ImageText
from emu35.rewards.sample import Cost, Range, Score, Unscored
from emu35.rewards.similarity import SimilarityReward

transformers = pytest.importorskip("transformers", reason="needs the extra 'rewards'")
from tiny_clip import write_clip  # noqa: E402 - it imports transformers

SHOWN = {"a bus": words("BUS"), "red taxi": words("TAXI", colour="red", side=80)}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return write_clip(tmp_path_factory.mktemp(name), siglip=name == "siglip")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("head"))


def test_scores_are_the_cosines_that_the_model_itself_gives(folder: Path) -> None:
    reward = SimilarityReward(SimilarityRewardConfig(model=str(folder)))
    samples = [sample(picture, caption=caption) for caption, picture in SHOWN.items()]
    scores = reward.score(samples)
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=list(SHOWN),
        images=[Image.fromarray(picture) for picture in SHOWN.values()],
        padding="max_length",
        max_length=16,
        return_tensors="pt",
    )
    if folder.name.startswith("siglip"):
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        output = model.eval()(**inputs)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    assert list(scores) == pytest.approx(cosines.tolist(), abs=1e-5)
    clip, siglip = Range(low=0.0, high=0.4), Range(low=-0.1, high=0.2)
    assert reward.range == (clip if folder.name.startswith("clip") else siglip)
    assert reward.cost is Cost.cpu


def test_batches_captions_and_several_pictures(folder: Path) -> None:
    reward = SimilarityReward(SimilarityRewardConfig(model=str(folder)))
    bus, taxi = SHOWN.values()
    asked = [
        sample(bus, caption="draw"),
        sample(bus),
        sample(),
        sample(taxi),
        sample(bus, taxi),
        sample(bus, caption="many words " * 50),
    ]
    scores = reward.score(asked)
    # The prompt of these samples is "draw".
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert isinstance(scores[2], Unscored)
    one, other = scores[1], scores[3]
    assert isinstance(one, float)
    assert isinstance(other, float)
    assert abs(one - other) > 1e-3
    assert scores[4] == pytest.approx((one + other) / 2, abs=1e-5)
    for answer, score in zip(asked, scores, strict=True):
        (alone,) = reward.score([answer])
        assert alone == score or alone == pytest.approx(score, abs=1e-5)
    assert reward.problems({"caption": " "})
    assert reward.problems({"caption": "a bus"}) == reward.problems({}) == []


def test_threads_share_one_model_and_no_network_is_asked(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    reward = SimilarityReward(SimilarityRewardConfig(model=str(clip)))
    samples = [sample(picture, caption=caption) for caption, picture in SHOWN.items()] * 4

    def one(index: int) -> Score:
        return reward.score([samples[index]])[0]

    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(one, range(len(samples))))
    assert scores == pytest.approx(list(reward.score(samples)), abs=1e-5)


def test_a_folder_that_holds_no_such_model_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        SimilarityReward(SimilarityRewardConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json or processor_config\.json"):
        SimilarityReward(SimilarityRewardConfig(model=str(tmp_path)))
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="of type 'bert'; use one of clip"):
        SimilarityReward(SimilarityRewardConfig(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="device='abacus'"):
        SimilarityReward(SimilarityRewardConfig(model=str(clip), device="abacus"))


def test_a_rank_judges_on_its_own_gpu(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "5")
    for said, device in (("cuda", "cuda:5"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        model = ImageText(SimilarityRewardConfig(model=str(clip), device=said))
        assert str(model.device) == device


def test_both_forms_of_the_head_judge_alike(clip: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(16, 5), torch.nn.Linear(5, 1)
    deep = {
        **{f"layers.0.{name}": tensor for name, tensor in first.state_dict().items()},
        **{f"layers.10.{name}": tensor for name, tensor in second.state_dict().items()},
    }
    flat = {
        "weight": (second.weight @ first.weight).detach().contiguous(),
        "bias": (second.weight @ first.bias + second.bias).detach(),
    }
    torch.save(deep, tmp_path / "deep.pth")
    save_file(flat, tmp_path / "flat.safetensors")
    answers = [sample(picture) for picture in SHOWN.values()]
    answers += [sample(), sample(*SHOWN.values())]
    scores: list[list[Score]] = []
    for name in ("deep.pth", "flat.safetensors"):
        config = AestheticsModelRewardConfig(model=str(clip), head=str(tmp_path / name))
        scores.append(list(AestheticsModelReward(config).score(answers)))
    for deep_score, flat_score in zip(*scores, strict=True):
        assert deep_score == flat_score or deep_score == pytest.approx(flat_score, abs=1e-5)
    one, other, none, both = scores[0]
    assert isinstance(none, Unscored)
    assert isinstance(one, float)
    assert isinstance(other, float)
    assert one != other
    assert both == pytest.approx((one + other) / 2, abs=1e-5)


def test_a_head_that_does_not_fit_is_named(clip: Path, tmp_path: Path) -> None:
    def open_head(weights: dict[str, torch.Tensor]) -> AestheticsModelReward:
        save_file(weights, tmp_path / "head.safetensors")
        head = str(tmp_path / "head.safetensors")
        return AestheticsModelReward(AestheticsModelRewardConfig(model=str(clip), head=head))

    with pytest.raises(ConfigError, match="a weight and a bias"):
        open_head({"weight": torch.ones(1, 16)})
    with pytest.raises(ConfigError, match="ends with 2 outputs"):
        open_head({"weight": torch.ones(2, 16), "bias": torch.ones(2)})
    wrong = open_head({"weight": torch.ones(1, 7), "bias": torch.ones(1)})
    with pytest.raises(ConfigError, match="takes 7 features, but its model gives 16"):
        wrong.score([sample(words("A"))])
    with pytest.raises(ConfigError, match="there is no file"):
        AestheticsModelReward(AestheticsModelRewardConfig(model=str(clip), head="gone.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    junk = str(tmp_path / "junk.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        AestheticsModelReward(AestheticsModelRewardConfig(model=str(clip), head=junk))
