"""The demo's adaptation to parallel decoding, and the same captions drawn both ways."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from budget import Budget
from report import picture_tag
from steps import Runner, say, shown, write_json
from tuning import Tuning

TASKS = ("t2i", "x2i", "story", "chat")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """Where it all lies, and one method a step; what is adapted is the model of ``tuning``."""

    out: Path
    budget: Budget
    runner: Runner
    tuning: Tuning

    @property
    def run(self) -> Path:
        return self.out / "dida"

    @property
    def evaluation(self) -> Path:
        return self.out / "dida_eval"

    @property
    def vision(self) -> Path:
        return self.tuning.vision

    @property
    def questions(self) -> Path:
        return self.out / "questions.json"

    def adapt(self) -> None:
        """``stage=dida`` from the fine-tuned model, on its own tasks."""
        self.runner.emu35(
            "run",
            "experiment=demo/dida",
            f"run_dir={shown(self.run)}",
            f"stage.init_from={shown(self.out / 'sft')}",
            f"tokenizer.vision={shown(self.vision)}",
            f"tokenizer.codebook_size={self.tuning.tokenizer_config.n_embed}",
            *(f"data.sources.{task}.path={shown(self._shards(task))}" for task in TASKS),
            *self.budget.dida_overrides,
        )

    def compare(self) -> None:
        """The held-out captions drawn token by token and in parallel, read by the verifier."""
        side = self.budget.resolution // self.tuning.tokenizer_config.factor
        self.runner.emu35(
            "run",
            "experiment=eval/dida",
            f"run_dir={shown(self.evaluation)}",
            f"stage.init_from={shown(self.run)}",
            f"stage.prompts={shown(self.out / 'corpus' / 'heldout.jsonl')}",
            f"stage.size=[{side},{side}]",
            *self.budget.dida_eval_overrides,
        )
        for row in self.rows():
            say(
                f"  {_title(row)}: {row['quality']['accuracy']['value']:.1%} of attributes right, "
                f"{row['forwards']:.0f} forwards and {row['seconds'] * 1000:.0f} ms a picture"
            )
        answered = self.tuning.questions("dida")
        write_json(self.questions, {"right": answered})
        say(f"  questions still answered right, in words: {answered:.0%}")

    def rows(self) -> list[dict[str, Any]]:
        """What was measured of every decoder."""
        found = json.loads((self.evaluation / "evaluation.json").read_text())
        return [row for row in found["rows"] if "forwards" in row]

    def summary(self) -> dict[str, Any]:
        """Flat keys for ``summary.json``: the first row is token by token."""
        facts: dict[str, Any] = {"dida_chat": json.loads(self.questions.read_text())["right"]}
        for row in self.rows():
            name = row["name"]
            facts[f"{name}_accuracy"] = row["quality"]["accuracy"]["value"]
            facts[f"{name}_right"] = row["quality"]["right"]["value"]
            facts[f"{name}_forwards"] = row["forwards"]
            facts[f"{name}_seconds_a_picture"] = round(row["seconds"], 4)
        return facts

    def html(self) -> str:
        """The report's section: table and pictures side by side."""
        rows = self.rows()
        table = "".join(
            f"<tr><td>{escape(_title(row))}</td>"
            f"<td>{row['quality']['accuracy']['value']:.1%}</td>"
            f"<td>{row['quality']['right']['value']:.1%}</td>"
            f"<td>{row['forwards']:.0f}</td><td>{row['seconds'] * 1000:.0f} ms</td></tr>"
            for row in rows
        )
        prompts = [
            json.loads(line)["prompt"]
            for line in (self.out / "corpus" / "heldout.jsonl").read_text().splitlines()
        ]
        strips = sorted((self.evaluation / "samples").glob("*.png"))
        tiles = "".join(
            f'<div class="tile"><div class="caption">{escape(prompts[at])}</div>'
            f'<div class="images">{picture_tag(strip)}</div></div>'
            for at, strip in enumerate(strips)
        )
        order = ", ".join(_title(row) for row in rows)
        before = json.loads((self.out / "tasks.json").read_text())["models"]["sft"]["accuracy"]
        after = json.loads(self.questions.read_text())["right"]
        return (
            "<h2>All codes of a picture at once</h2><p>The fine-tuned model, adapted to predict "
            "every code of a noisy picture in one forward (DiDA), draws held-out captions token by "
            "token and in steps of denoising. A CPU computes 64 codes at once hardly faster than "
            "one after another, so 25 steps for so small a picture take it longer; a GPU waits for "
            "memory at every token, and there forwards are what counts.</p><table><tr><th></th>"
            "<th>attributes right</th><th>pictures right</th><th>forwards a picture</th>"
            f"<th>time a picture</th></tr>{table}</table><p>Questions on pictures, answered in "
            f"words, were answered right in {before['chat']:.0%} of cases before the adaptation "
            f"and in {after:.0%} after it.</p><p>From the left: as asked for, "
            f'{escape(order)}.</p><div class="strips">{tiles}</div>'
        )

    def _shards(self, task: str) -> Path:
        return self.out / "shards" / "tasks" / task


def _title(row: dict[str, Any]) -> str:
    return "token by token" if row["steps"] is None else f"in {row['steps']} steps"
