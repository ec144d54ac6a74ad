"""The recipes of the paper, each from the one before, in their own layouts: only sizes shrink."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_lm
from tiny_qwen3 import make_qwen3
from tiny_vision import write_tiny_ibq
from torchrun_ranks import run_ranks

from emu35.config import (
    DiDAConfig,
    LMConfig,
    LMStageConfig,
    RunConfig,
    TokenDataConfig,
    TokenizerConfig,
)
from emu35.config.io import read_config
from emu35.config.tokenizer import TokenizerKind
from emu35.data.shards import ShardMeta
from emu35.data.writer import ShardWriter
from emu35.run.compose import compose
from emu35.tokens.document import Document, Image, Part, Special, Text
from emu35.tokens.serialize import serialize
from emu35.tokens.template import Task, question_parts
from emu35.tokens.text import TextTokenizer, build_text_tokenizer

pytestmark = [pytest.mark.multiproc, pytest.mark.usefixtures("table")]

PARENTS = {
    "pretrain_s1": "Qwen3-32B",
    "pretrain_s2": "pretrain_s1",
    "sft_s1": "pretrain_s2",
    "sft_s2": "sft_s1",
    "sft_lora": "sft_s2",
    "dida": "sft_s2",
}
"""Experiment -> what it starts from, as its file says."""

MOST_RANKS = 4
SHRUNK = LMConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipes:
    """Runs each experiment once, its parents first."""

    folder: Path

    def run(self, name: str) -> Path:
        done = self.folder / name
        if name not in PARENTS or done.exists():
            return done
        start = self.run(PARENTS[name])
        words = ["-m", "emu35", "run", f"experiment=emu35_34b/{name}", f"run_dir={done}"]
        composed = compose([f"experiment=emu35_34b/{name}"])
        overrides = shrink(composed, data=self.folder / "data")
        if composed.tokenizer.vision is not None:
            overrides.append(f"tokenizer.vision={self.vision()}")
        run_ranks([*words, f"stage.init_from={start}", *overrides], ranks=1, timeout=300)
        return done

    def vision(self) -> Path:
        """An image tokenizer with the codebook's size and next to nothing else."""
        folder = self.folder / "vision"
        if not folder.exists():
            write_tiny_ibq(folder, codes=131_072, z_channels=4, embed_dim=4)
        return folder


def shrink(config: RunConfig, *, data: Path) -> list[str]:
    """Every size divided until it fits; the kinds of parallelism, packing, masks and weights
    stay."""
    section, stage, parallel = config.data, config.stage, config.parallel
    assert isinstance(section, TokenDataConfig)
    assert isinstance(stage, LMStageConfig)
    tp, cp, pp = (min(size, 2) for size in (parallel.tp, parallel.cp, parallel.pp))
    ranks = MOST_RANKS if parallel.zero1 else tp * cp * pp
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    noisy: list[str] = []
    if isinstance(stage, DiDAConfig):
        noisy = [f"stage.noisy_length={stage.noisy_length // 64}"]
        # Each code is drawn among 131,072, three times for every document.
        noisy += [f"data.validation.{name}.max_documents=2" for name in section.validation]
    return [
        *noisy,
        *(f"model.{name}={getattr(SHRUNK, name)}" for name in (*sizes, "num_kv_heads", "head_dim")),
        f"parallel.tp={tp}",
        f"parallel.cp={cp}",
        f"parallel.pp={pp}",
        # Fused layers need a GPU; all else of the engine's settings stays.
        "engine.layers=local",
        "launch=local",
        f"launch.nproc={ranks}",
        "launch.nodes=1",
        "stage.steps=2",
        f"stage.global_batch_size={2 * ranks // (tp * cp * pp)}",
        f"data.sequence_length={section.sequence_length // 64}",
        # Four rows are made in all: sixteen open ones would still be filling.
        "data.open_bins=1",
        *(f"data.sources.{name}.path={folder_of(name, data=data)}" for name in section.sources),
        *(
            f"data.validation.{name}.path={folder_of(name, data=data)}"
            for name in section.validation
        ),
        "log=console",
        "optim.warmup_steps=1",
    ]


TASKS = {
    "general": Task.chat,
    "any_to_image": Task.x2i,
    "visual_narrative": Task.story,
    "visual_guidance": Task.howto,
    "world_exploration": Task.explore,
    "embodied_manipulation": Task.vla,
    "distilled_t2i": Task.t2i,
    "distilled_interleaved": Task.story,
}


def folder_of(name: str, *, data: Path) -> Path:
    return data / (name if name in TASKS else "documents")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    folder = tmp_path_factory.mktemp("recipes")
    make_qwen3(
        folder / "Qwen3-32B",
        model=tiny_lm(
            **{
                name: getattr(SHRUNK, name)
                for name in (
                    "num_layers",
                    "hidden_size",
                    "ffn_hidden_size",
                    "num_attention_heads",
                    "num_kv_heads",
                    "head_dim",
                )
            }
        ),
    )
    tokenizer = build_text_tokenizer(
        TokenizerConfig(kind=TokenizerKind.emu35, codebook_size=131_072)
    )
    rng = np.random.default_rng(0)
    plain: list[list[Part]] = [
        [Text(f"Number {number}. "), Image(rng.integers(0, 131_072, size=(4, 5)))]
        for number in range(24)
    ]
    write(folder / "data" / "documents", plain, tokenizer=tokenizer)
    for name, task in TASKS.items():
        codes = rng.integers(0, 131_072, size=(12, 3, 4))
        write(folder / "data" / name, [answered(task, grid) for grid in codes], tokenizer=tokenizer)
    return Recipes(folder=folder)


def answered(task: Task, codes_HW: Any) -> list[Part]:
    asked = question_parts(task, "What comes next?", images=[Image(codes_HW)])
    return [*asked, Text("This:"), Image(codes_HW[::-1]), Special("<|extra_101|>")]


def write(folder: Path, documents: Sequence[list[Part]], *, tokenizer: TextTokenizer) -> None:
    v = tokenizer.vocabulary
    meta = ShardMeta(source="x", kind="emu35", n_text=v.n_text, codebook_size=v.codebook_size)
    with ShardWriter(folder=folder, meta=meta, shard_bytes=2**20) as writer:
        for number, parts in enumerate(documents):
            writer.append(serialize(Document(parts), tokenizer), document_id=str(number))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "pretrain_s1")) for name in PARENTS],
)
def test_a_recipe_trains_two_steps_in_its_own_layout(recipes: Recipes, name: str) -> None:
    run = recipes.run(name)
    composed, ran = compose([f"experiment=emu35_34b/{name}"]), read_config(run)
    assert Path(str(composed.stage.init_from)).name.removeprefix("emu35_34b_") == PARENTS[name]
    for size in ("tp", "cp", "pp"):
        asked, got = getattr(composed.parallel, size), getattr(ran.parallel, size)
        assert (got > 1) is (asked > 1)
    assert (ran.parallel.sp, ran.parallel.zero1) == (composed.parallel.sp, composed.parallel.zero1)
    assert isinstance(composed.stage, LMStageConfig)
    assert isinstance(ran.stage, LMStageConfig)
    assert ran.stage.loss_weights == composed.stage.loss_weights
    assert isinstance(composed.data, TokenDataConfig)

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "grad_norm" in row]
    assert [row["step"] for row in trained] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in trained)
    learned = {key for row in trained for key in row if key.startswith("loss/")}
    mixed = {f"loss/{source}" for source, entry in composed.data.sources.items() if entry.ratio > 0}
    assert learned <= mixed
    assert len(learned) > 1
    validated = {
        match[1] for row in rows for key in row if (match := re.match(r"val/(.*)/loss", key))
    }
    views = ["", "_t25", "_t50", "_t75"] if isinstance(composed.stage, DiDAConfig) else [""]
    assert validated == {set_ + view for set_ in composed.data.validation for view in views}
    if isinstance(composed.stage, DiDAConfig):
        assert all(row["loss_noisy"] > 0 and row["loss_next_token"] > 0 for row in trained)
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "step_00000002"
