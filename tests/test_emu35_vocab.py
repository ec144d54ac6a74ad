"""The released vocabulary walked from pictures to a release, through the command line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from emu35.checkpoint.safetensor_files import SafetensorFolder
from emu35.data.scenes.captions import Language, caption
from emu35.data.scenes.describe import Split, sample_scene
from emu35.data.scenes.render import render

VOCABULARY, CODES = 282926, 131072


def emu35(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "emu35", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("table")
def test_from_pictures_to_a_release_with_all_282926_ids(tmp_path: Path) -> None:
    rng = random.Random(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        scene = sample_scene(rng, split=Split.train)
        render(scene, resolution=128).save(corpus / f"{number}.png")
        (corpus / f"{number}.txt").write_text(caption(scene, rng=rng, language=Language.en))

    emu35("run", "experiment=tiny/ibq_131k", "run_dir=ibq", "data.paths=[corpus]", cwd=tmp_path)
    vision = "ibq/vision_tokenizer"
    table = ("--tokenizer", "emu35", "--codebook-size", str(CODES), "--vision", vision)
    emu35("data", "ingest", "corpus", "--out", "shards", *table, "--area", "128x128", cwd=tmp_path)
    assert (tmp_path / "shards" / "rejects.jsonl").read_text() == ""
    emu35(
        "run",
        "experiment=tiny/emu35_vocab",
        "run_dir=run",
        f"tokenizer.vision={vision}",
        "data.sources.all.path=shards",
        cwd=tmp_path,
    )
    emu35("convert", "export", "--run", "run", "--out", "release", cwd=tmp_path)
    emu35("convert", "verify", "--release", "release", "--against", "run", cwd=tmp_path)

    release = tmp_path / "release"
    config = json.loads((release / "config.json").read_text())
    # heads x head_dim differs from the hidden size, which a loader that derives one from the
    # other would get wrong.
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (64, 32, 4)
    shapes = SafetensorFolder(release).shapes
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (VOCABULARY, 64)

    emu35("convert", "import", "--from", "release", "--out", "back", cwd=tmp_path)
    emu35("convert", "export", "--run", "back", "--out", "again", cwd=tmp_path)
    assert contents(tmp_path / "again") == contents(release)

    pictures: list[bytes] = []
    for source in (("--run", "run"), ("--release", "release")):
        out = source[1] + "_pictures"
        emu35(
            "generate", *source, "--task", "t2i", "--prompt", "a red circle",
            "--size", "4x4", "--out", out, cwd=tmp_path,
        )  # fmt: skip
        (picture,) = (tmp_path / out).glob("*.png")
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1]
