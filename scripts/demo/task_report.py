"""The report's section on tasks: how often each model is right, and answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from report import picture_tag
from tuning import MODELS

TASKS = {
    "t2i": "draw a caption (t2i)",
    "x2i": "edit a picture (x2i)",
    "story": "two-step story (story)",
    "chat": "question on a picture (chat)",
}
SHOWN_PROMPTS = 4
"""Prompts of each task in the report, the first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSection:
    """``tasks`` is ``tasks.json``; pictures lie below ``out``."""

    tasks: dict[str, Any]
    out: Path

    def html(self) -> str:
        """Table and tiles."""
        return (
            "<h2>Fine-tuning: instructions followed</h2><p>Share of held-out prompts answered "
            "right: every picture of the answer has the right number of objects, each in its "
            "colour and place; a question is answered in exactly the expected words. "
            "<i>Pretraining alone</i> is asked in the plain form that it was trained on; it was "
            "never taught to edit, to tell or to answer, only to draw. The others are asked in the "
            "prompts of the release. <i>Adapters alone</i>: LoRA, all pretrained weights frozen. "
            "<i>Chance</i>: the pictures held against other prompts, and the best single answer to "
            "each kind of question. <i>True pictures</i>: what was asked for, encoded and decoded "
            "by the image tokenizer.</p>"
            f"{self._table()}{''.join(self._examples(task) for task in TASKS)}"
        )

    def _table(self) -> str:
        columns = {
            "chance": self.tasks["chance"],
            **{name: self.tasks["models"][model]["accuracy"] for model, name in MODELS.items()},
            "true pictures": self.tasks["ceiling"],
        }
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        rows = "".join(
            f"<tr><td>{escape(title)}</td>"
            + "".join(f"<td>{shares[task]:.0%}</td>" for shares in columns.values())
            + "</tr>"
            for task, title in {**TASKS, "mean": "mean"}.items()
        )
        return f"<table><tr><th></th>{head}</tr>{rows}</table>"

    def _examples(self, task: str) -> str:
        prompts = self.tasks["prompts"]
        chosen = [index for index, prompt in enumerate(prompts) if prompt["task"] == task]
        tiles = "".join(self._tile(index) for index in chosen[:SHOWN_PROMPTS])
        return f'<p><b>{escape(TASKS[task])}</b></p><div class="pairs">{tiles}</div>'

    def _tile(self, index: int) -> str:
        prompt = self.tasks["prompts"][index]
        asked = self._images(prompt.get("images", []), folder=self.out / "corpus" / "tasks")
        answers = "".join(self._answer(model, index) for model in MODELS)
        return (
            f'<div class="tile"><div class="caption">{escape(prompt["prompt"])}</div>'
            f"{asked}{answers}</div>"
        )

    def _answer(self, model: str, index: int) -> str:
        answer = self.tasks["models"][model]["answers"][index]
        mark = "yes" if answer["right"] else "no"
        words = answer["text"].strip()
        images = self._images(answer["pictures"], folder=self.out / "answers" / model)
        return (
            f'<div class="marks"><span class="{mark}">{escape(MODELS[model])}</span></div>'
            f'<div class="read">{escape(words[:200])}</div>{images}'
        )

    @staticmethod
    def _images(names: Sequence[str], *, folder: Path) -> str:
        if not names:
            return ""
        tags = "".join(picture_tag(folder / name) for name in names)
        return f'<div class="images">{tags}</div>'
