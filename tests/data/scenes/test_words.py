"""Pictures of words: what is written is what is drawn, and held-out words are never seen."""

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emu35.config.reward_local import OcrRewardConfig
from emu35.data.scenes.captions import Language
from emu35.data.scenes.corpus import sample_prompts, sample_word_prompts, write_words
from emu35.data.scenes.describe import BACKGROUND_RGB, RGB, Scene, Size, Split, split_of
from emu35.data.scenes.tasks import write_task_prompts, write_word_task
from emu35.data.scenes.words import (
    CELLS,
    LETTERS,
    SHARES,
    Word,
    Words,
    render_word,
    sample_word,
    word_caption,
    word_use,
)
from emu35.errors import DataError
from emu35.rewards.sample import Sample


def some(use: Words, *, count: int = 40) -> list[Word]:
    rng = random.Random(5)
    return [sample_word(rng, use=use) for _ in range(count)]


def test_letters_stand_in_columns_of_their_own_whatever_stands_beside_them() -> None:
    for word in some(Words.pictured):
        pixels_HW3 = np.asarray(render_word(word, resolution=64)).astype(int)
        far_HW = np.abs(pixels_HW3 - BACKGROUND_RGB[word.background]).max(axis=2) > 8
        rows = np.nonzero(far_HW.any(axis=1))[0]
        width, height = (64 * share for share in CELLS[word.size])
        # One pixel of antialiasing on either side.
        assert np.ptp(rows) + 1 <= height + 2
        assert abs(rows.mean() - 31.5) < 2
        for number in range(2):
            columns = np.nonzero(far_HW[:, 32 * number : 32 * (number + 1)].any(axis=0))[0]
            assert 0.5 * width < np.ptp(columns) + 1 <= width + 2
            assert abs(columns.mean() - 15.5) < 3
        assert (pixels_HW3 == RGB[word.colour]).all(axis=2).sum() > 20
        other = replace(word, text=word.text[0] + "L")
        left = np.asarray(render_word(other, resolution=64))[:, :32]
        assert np.array_equal(left, pixels_HW3[:, :32])


@pytest.mark.slow
def test_a_reader_reads_every_word_and_the_reward_tells_a_wrong_letter() -> None:
    pytest.importorskip("rapidocr")
    from emu35.rewards.ocr import OcrReward

    reward = OcrReward(OcrRewardConfig())

    def score(text: str, word: Word) -> float:
        sample = Sample(
            record={"text": text},
            task="t2i",
            prompt="",
            texts=["", ""],
            pictures=[np.asarray(render_word(word, resolution=64))],
        )
        (found,) = reward.score([sample])
        assert isinstance(found, float)
        return found

    words = [replace(word, size=Size.large) for word in some(Words.held_out)]
    assert [score(word.text, word) for word in words] == [1.0] * len(words)
    other = {letter: LETTERS[at - 1] for at, letter in enumerate(LETTERS)}
    wrong = [score(other[word.text[0]] + word.text[1], word) for word in words]
    assert max(wrong) == 0.5


def test_uses_share_letters_and_no_word() -> None:
    every = [first + second for first in LETTERS for second in LETTERS]
    of = {use: {text for text in every if word_use(text) is use} for use in Words}
    assert sum(map(len, of.values())) == len(every)
    for use, texts in of.items():
        assert abs(len(texts) / len(every) - SHARES[use]) < 0.1
        assert {word.text for word in some(use, count=200)} <= texts
        # Every letter at either place.
        for place in range(2) if use is not Words.held_out else ():
            assert {text[place] for text in texts} == set(LETTERS)


def test_captions_name_the_word_and_its_colour() -> None:
    rng = random.Random(1)
    for word in some(Words.pictured):
        english = word_caption(word, rng=rng, language=Language.en)
        assert f'"{word.text}"' in english
        assert str(word.colour) in english
        chinese = word_caption(word, rng=rng, language=Language.zh)
        assert f'"{word.text}"' in chinese
        assert not chinese.isascii()


def test_a_tar_holds_pictures_captions_and_descriptions_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_words(tmp_path / name, count=6, seed=3, resolution=32)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 18
    for number in range(6):
        facts = json.loads(members[f"{number:09d}.json"])
        word = Word.from_json(facts["word"])
        assert word_use(word.text) is Words.pictured
        assert word.text in facts["caption"]
        picture = Image.open(io.BytesIO(members[f"{number:09d}.png"]))
        assert np.array_equal(np.asarray(picture), np.asarray(render_word(word, resolution=32)))


def test_prompts_carry_what_the_rewards_need() -> None:
    prompts = sample_word_prompts(count=30, seed=2, use=Words.held_out)
    assert len({prompt["prompt"] for prompt in prompts}) == 30
    for prompt in prompts:
        assert prompt["text"] in prompt["prompt"]
        assert word_use(prompt["text"]) is Words.held_out
        assert Word.from_json(prompt["word"]).text == prompt["text"]
    with pytest.raises(DataError, match="hardly more than"):
        sample_word_prompts(count=100_000, seed=2, use=Words.held_out)
    scenes = sample_prompts(count=10, seed=2, split=Split.train)
    assert all(split_of(Scene.from_json(each["scene"])) is Split.train for each in scenes)


def test_records_to_train_on_and_prompts_of_the_training_side(tmp_path: Path) -> None:
    path = write_word_task(tmp_path, count=4, seed=2, resolution=32)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["task"] for record in records] == ["t2i"] * 4
    assert all((tmp_path / record["image"]).is_file() for record in records)
    prompts = write_task_prompts(
        tmp_path, count=2, seed=2, resolution=32, size="4x4", split=Split.train
    )
    drawn = [
        Scene.from_json(scene) for each in prompts for scene in each["expect"].get("scenes", [])
    ]
    assert drawn
    assert all(split_of(scene) is Split.train for scene in drawn)
    assert all(prompt["id"].split("-")[1] == "train" for prompt in prompts)
