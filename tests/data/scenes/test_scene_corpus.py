"""The corpus on disk: img2dataset's layout, the same bytes every time, whole or absent."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emu35.data.scenes.corpus import sample_prompts, write_scenes
from emu35.data.scenes.describe import Scene, Split, split_of
from emu35.data.scenes.verify import read_scene, score
from emu35.errors import DataError


def write(path: Path, *, split: Split = Split.train, seed: int = 1) -> Path:
    write_scenes(path, split=split, count=12, seed=seed, resolution=96)
    return path


def test_a_record_is_a_picture_its_caption_and_its_description(tmp_path: Path) -> None:
    path = write(tmp_path / "scenes" / "val-00000.tar", split=Split.val)
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 36
    for number in range(12):
        facts = json.loads(members[f"{number:09d}.json"])
        scene = Scene.from_json(facts["scene"])
        assert split_of(scene) is Split.val
        assert facts["caption"] == members[f"{number:09d}.txt"].decode()
        image = Image.open(io.BytesIO(members[f"{number:09d}.png"]))
        got = score(read_scene(np.asarray(image)), scene=scene)
        assert got.colour_correct == got.shape_correct == got.objects == got.found


def test_stock_webdataset_reads_it(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    path = write(tmp_path / "train-00000.tar")
    dataset = WebDataset(str(path), shardshuffle=False).decode("pil")
    samples: list[Any] = list(iter(dataset))  # type: ignore[call-overload]
    assert len(samples) == 12
    assert samples[0]["png"].size == (96, 96)
    assert samples[0]["txt"] == samples[0]["json"]["caption"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a.tar").read_bytes()
    assert write(tmp_path / "b.tar").read_bytes() == first
    assert write(tmp_path / "c.tar", seed=2).read_bytes() != first


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"no space left to write .*a\.tar.*Free some space"):
        write(tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


def test_prompts_are_held_out_distinct_and_half_of_them_single() -> None:
    prompts = sample_prompts(count=60, seed=0)
    found = [Scene.from_json(prompt["scene"]) for prompt in prompts]
    assert all(split_of(scene) is Split.val for scene in found)
    assert len({scene.objects for scene in found}) == 60
    assert sum(len(scene.objects) == 1 for scene in found) >= 30
    assert {prompt["language"] for prompt in prompts} == {"en", "zh"}
    assert len({prompt["id"] for prompt in prompts}) == 60


@pytest.mark.slow
def test_more_prompts_than_there_are_single_objects_still_differ() -> None:
    prompts = sample_prompts(count=300, seed=0)
    objects = [json.dumps(prompt["scene"]["objects"]) for prompt in prompts]
    assert len(set(objects)) == 300
    assert 50 < sum(len(prompt["scene"]["objects"]) == 1 for prompt in prompts) < 150
