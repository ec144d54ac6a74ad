"""The demo's fine-tuning on scene tasks, of the whole model and of adapters alone, with answers
before and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bounds import ceiling, chance
from budget import Budget
from emu35.config import IBQConfig
from emu35.config.io import read_config
from emu35.data.scenes.task_score import AnswerScore, score_answer
from emu35.data.scenes.tasks import write_task, write_task_prompts, write_word_task
from evaluate import pixels_of, read_lines
from steps import Runner, say, shown, write_json, write_text

MODELS = {"pretrain": "pretraining alone", "sft": "fine-tuning", "lora": "adapters alone"}
"""Name of a run in the demo's folder -> what the report calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Where it all lies, and one method a step; ``vision`` is the image tokenizer's folder."""

    out: Path
    budget: Budget
    runner: Runner
    seed: int
    vision: Path

    @property
    def tokenizer_config(self) -> IBQConfig:
        """That of the image tokenizer's run; what follows takes its numbers from there."""
        model = read_config(self.vision.parent).model
        assert isinstance(model, IBQConfig)
        return model

    @property
    def heldout(self) -> Path:
        return self.records / "heldout.jsonl"

    @property
    def records(self) -> Path:
        return self.out / "corpus" / "tasks"

    def tasks(self) -> None:
        """Task records with their pictures, ingested; held-out prompts beside them."""
        side = self.budget.resolution
        codes = side // self.tokenizer_config.factor
        for task, count in self.budget.task_records.items():
            path = self._records_of(task, count=count)
            self.runner.emu35(
                "data",
                "ingest",
                shown(path),
                "--recipe",
                "demo/sft",
                "--source",
                task,
                "--out",
                shown(self._shards(task)),
                "--vision",
                shown(self.vision),
                "--codebook-size",
                str(self.tokenizer_config.n_embed),
            )
        prompts = write_task_prompts(
            self.records,
            count=self.budget.task_prompts,
            seed=self.seed,
            resolution=side,
            size=f"{codes}x{codes}",
        )
        write_text(self.heldout, "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))

    def _records_of(self, task: str, *, count: int) -> Path:
        """Training records of ``task``, written; ``words`` are captions as those of t2i are."""
        side = self.budget.resolution
        if task == "words":
            return write_word_task(self.records, count=count, seed=self.seed, resolution=side)
        return write_task(self.records, task=task, count=count, seed=self.seed, resolution=side)

    def sft(self) -> None:
        """``stage=sft`` on all weights."""
        self._train("sft", "demo/sft", self.budget.sft_overrides)

    def lora(self) -> None:
        """``stage=sft`` on adapters, with the pretrained weights frozen."""
        self._train("lora", "demo/sft_lora", self.budget.lora_overrides)

    def answer(self) -> None:
        """The held-out prompts answered by all three, and scored."""
        prompts = read_lines(self.heldout)
        models: dict[str, Any] = {}
        for name in MODELS:
            self._generate(name)
            answers = _answers(prompts, folder=self.out / "answers" / name)
            models[name] = {"answers": answers, "accuracy": _accuracy(prompts, answers=answers)}
            figures = ", ".join(
                f"{task} {value:.0%}" for task, value in models[name]["accuracy"].items()
            )
            say(f"  {MODELS[name]}: {figures}")
        drawn = [
            [pixels_of(self.out / "answers" / "sft" / name) for name in answer["pictures"]]
            for answer in models["sft"]["answers"]
        ]
        bounds = {
            "chance": chance(prompts, pictures=drawn),
            "ceiling": ceiling(prompts, vision=self.vision, resolution=self.budget.resolution),
        }
        write_json(self.out / "tasks.json", {"prompts": prompts, "models": models, **bounds})

    def questions(self, name: str) -> float:
        """Share of the held-out questions that the run ``name`` answers right."""
        prompts = [prompt for prompt in read_lines(self.heldout) if prompt["task"] == "chat"]
        asked = self.records / "questions.jsonl"
        write_text(asked, "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
        self._generate(name, prompts=asked)
        answers = _answers(prompts, folder=self.out / "answers" / name)
        return _accuracy(prompts, answers=answers)["chat"]

    def _shards(self, task: str) -> Path:
        return self.out / "shards" / "tasks" / task

    def _train(self, name: str, experiment: str, overrides: Sequence[str]) -> None:
        self.runner.emu35(
            "run",
            f"experiment={experiment}",
            f"run_dir={shown(self.out / name)}",
            f"stage.init_from={shown(self.out / 'pretrain')}",
            f"tokenizer.vision={shown(self.vision)}",
            f"tokenizer.codebook_size={self.tokenizer_config.n_embed}",
            *(
                f"data.sources.{task}.path={shown(self._shards(task))}"
                for task in self.budget.task_records
            ),
            *overrides,
        )

    def _generate(self, name: str, *, prompts: Path | None = None) -> None:
        """Each model is asked in the prompts that it was trained for."""
        self.runner.emu35(
            "generate",
            "--run",
            shown(self.out / name),
            "--prompts-file",
            shown(prompts or self.heldout),
            "--image-area",
            str(self.budget.resolution**2),
            "--out",
            shown(self.out / "answers" / name),
            *self.budget.answer_options,
        )


def _answers(prompts: Sequence[Mapping[str, Any]], *, folder: Path) -> list[dict[str, Any]]:
    """What came for each prompt, in their order: ``text``, ``pictures`` (file names), ``right``
    and the counts of colours and shapes."""
    rows = {row["index"]: row for row in read_lines(folder / "results.jsonl")}
    found: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        row = rows[index]
        text = "".join(part.get("text", "") for part in row["parts"])
        pictures = [pixels_of(folder / name) for name in row["images"]]
        result = score_answer(prompt["expect"], text=text, pictures=pictures)
        found.append({"text": text, "pictures": row["images"], **_counts(result)})
    return found


def _counts(result: AnswerScore) -> dict[str, Any]:
    return {
        "right": result.right,
        "objects": sum(picture.objects for picture in result.pictures),
        "colours": sum(picture.colour_correct for picture in result.pictures),
        "shapes": sum(picture.shape_correct for picture in result.pictures),
    }


def _accuracy(
    prompts: Sequence[Mapping[str, Any]], *, answers: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Share of right answers by task, and ``mean`` over the tasks."""
    right: dict[str, list[bool]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        right.setdefault(prompt["task"], []).append(answer["right"])
    shares = {task: sum(values) / len(values) for task, values in right.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}
