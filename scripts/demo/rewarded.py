"""The demo's reinforcement learning: scenes judged by the verifier, words by a reader of
characters, with held-out prompts drawn before and after."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from budget import Budget
from emu35.data.scenes.describe import Split
from emu35.log.charts import Series, line_chart
from emu35.log.jsonl import read_rows
from evaluate import find_pictures, pixels_of, read_lines
from report import picture_tag
from steps import Runner, say, shown, write_json, write_text
from tuning import Tuning

TASKS = {"wishes": "shapes, judged by the verifier", "words": "words, read by OCR"}
MODELS = {"sft": "before", "grpo": "after"}
SHOWN_PROMPTS = 12
"""Held-out prompts of each task in the report, the first ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewarded:
    """Where it all lies, and one method a step; the model of ``tuning`` goes on learning."""

    out: Path
    budget: Budget
    runner: Runner
    tuning: Tuning

    @property
    def run(self) -> Path:
        return self.out / "grpo"

    @property
    def evaluation(self) -> Path:
        return self.out / "rewarded.json"

    def prompts(self, task: str, split: Split) -> Path:
        """The file of prompts of ``task``, to learn from or held out."""
        return self.out / "prompts" / f"{task}_{split}.jsonl"

    def learn(self) -> None:
        """``stage=grpo`` from the fine-tuned model, on prompts without pictures."""
        self._write_prompts()
        self.runner.emu35(
            "run",
            "experiment=demo/grpo",
            f"run_dir={shown(self.run)}",
            f"stage.init_from={shown(self.out / 'sft')}",
            f"tokenizer.vision={shown(self.tuning.vision)}",
            f"tokenizer.codebook_size={self.tuning.tokenizer_config.n_embed}",
            *(
                f"data.{kind}.{task}.path={shown(self.prompts(task, split))}"
                for kind, split in (("tasks", Split.train), ("validation", Split.val))
                for task in TASKS
            ),
            f"data.validation.captions.path={shown(self.prompts('captions', Split.val))}",
            *self.budget.grpo_overrides,
        )

    def _write_prompts(self) -> None:
        from emu35.data.scenes.corpus import sample_prompts, sample_word_prompts
        from emu35.data.scenes.wishes import sample_wishes
        from emu35.data.scenes.words import Words

        seed = self.tuning.seed
        for split, use, count in (
            (Split.train, Words.practised, self.budget.grpo_prompts),
            (Split.val, Words.held_out, self.budget.grpo_heldout),
        ):
            wishes = sample_wishes(count=count, seed=seed, split=split)
            _write_lines(self.prompts("wishes", split), wishes)
            words = sample_word_prompts(count=count, seed=seed, use=use)
            _write_lines(self.prompts("words", split), words)
        captions = sample_prompts(count=self.budget.grpo_heldout, seed=seed)
        _write_lines(self.prompts("captions", Split.val), captions)

    def judge(self) -> None:
        """The held-out prompts drawn by the model before and after, and what the rewards say."""
        side = self.tuning.budget.resolution // self.tuning.tokenizer_config.factor
        found: dict[str, Any] = {}
        for task in TASKS:
            prompts = read_lines(self.prompts(task, Split.val))
            for model in MODELS:
                folder = self._drawn(task, model)
                self.runner.emu35(
                    *("generate", "--run", shown(self.out / model), "--task", "t2i"),
                    *("--prompts-file", shown(self.prompts(task, Split.val))),
                    *("--out", shown(folder), "--size", f"{side}x{side}"),
                    *self.budget.grpo_answer_options,
                )
                pictures = find_pictures(prompts, folder=folder)
                found.setdefault(task, {})[model] = _judged(prompts, task=task, pictures=pictures)
        write_json(self.evaluation, found)
        for task, models in found.items():
            say(
                f"  {TASKS[task]}: {models['sft']['share']:.1%} right before, "
                f"{models['grpo']['share']:.1%} after; whole pictures "
                f"{models['sft']['whole']:.1%} and {models['grpo']['whole']:.1%}"
            )

    def summary(self) -> dict[str, Any]:
        """Flat keys for ``summary.json``: shares of attributes or characters that are right, of
        pictures in which all are, and mean rewards of held-out prompts in [1, 10]."""
        facts: dict[str, Any] = {}
        for task, models in json.loads(self.evaluation.read_text()).items():
            for model, when in MODELS.items():
                facts[f"grpo_{task}_{when}"] = models[model]["share"]
                facts[f"grpo_{task}_whole_{when}"] = models[model]["whole"]
        for task in (*TASKS, "captions"):
            rewards = [value for _, value in self._points(f"val/{task}/reward")]
            facts |= {f"grpo_reward_{task}_before": rewards[0]}
            facts |= {f"grpo_reward_{task}_after": rewards[-1]}
        return facts

    def html(self) -> str:
        """The report's section: curves, table, and pictures before and after."""
        found = json.loads(self.evaluation.read_text())
        rows = "".join(
            f"<tr><td>{escape(title)}</td>"
            + "".join(
                f"<td>{found[task][model][kind]:.1%}</td>"
                for kind in ("share", "whole")
                for model in MODELS
            )
            + "</tr>"
            for task, title in TASKS.items()
        )
        heads = "".join(
            f"<th>{escape(f'{what}, {when}')}</th>"
            for what in ("attributes or characters right", "pictures all right")
            for when in MODELS.values()
        )
        tiles = "".join(self._tiles(task, found[task]) for task in TASKS)
        return (
            "<h2>Reinforcement learning</h2><p>The fine-tuned model goes on without being shown a "
            "picture (GRPO): it answers every prompt several times, programs judge the answers, "
            "and those better than the others to the same prompt are made likelier. What the "
            "programs like is in no caption, so no picture could have taught it. <i>Shapes</i>: "
            "captions name shape and colour; the verifier reads both back, and wants the shape "
            "large and in the middle. <i>Words</i>: letters may be large or small, and optical "
            "character recognition cannot make out small ones; none of these words was ever "
            "pictured. Rewards are shares of attributes or characters, from 1 to 10. Held-out "
            "prompts are never practised; <i>captions</i> leave nothing open and show what "
            "becomes of everything else.</p>"
            f'<div class="charts">{"".join(self._charts())}</div>'
            f"<table><tr><th></th>{heads}</tr>{rows}</table>"
            "<p>Left before, right after, with what was read.</p>"
            f"{tiles}"
        )

    def _charts(self) -> list[str]:
        """Rewards, and what else is to be watched while they rise."""
        heldout = [
            (f"{task}, held out", f"val/{task}/reward", True) for task in (*TASKS, "captions")
        ]
        sampled = [(f"{task}, sampled", f"reward/{task}", False) for task in TASKS]
        return [
            line_chart(
                [
                    Series(name=name, points=self._points(key), marked=marked)
                    for name, key, marked in (*heldout, *sampled)
                ],
                x_label="step",
                title="Mean reward, 1 to 10",
                lowest=1.0,
                highest=10.0,
            ),
            line_chart(
                [Series(name="KL to the model before", points=self._points("kl"))],
                x_label="step",
                title="KL, nats a sampled token",
            ),
            line_chart(
                [
                    Series(name="entropy, nats a token", points=self._points("entropy")),
                    Series(
                        name="different pictures of a group",
                        points=self._points("diversity/images"),
                    ),
                ],
                x_label="step",
                title="Diversity",
            ),
            line_chart(
                [
                    Series(name=phase.replace("_", " "), points=self._shares(phase))
                    for phase in ("sampling", "scoring", "replay", "forward_backward")
                ],
                x_label="step",
                title="Share of wall time",
            ),
        ]

    def _points(self, key: str) -> list[tuple[float, float]]:
        rows = read_rows(self.run / "metrics.jsonl")
        return [(row["step"], row[key]) for row in rows if row.get(key) is not None]

    def _shares(self, phase: str) -> list[tuple[float, float]]:
        """Of a step's wall time."""
        steps = dict(self._points("time/step"))
        return [(at, value / steps[at]) for at, value in self._points(f"time/{phase}")]

    def _tiles(self, task: str, models: Mapping[str, Any]) -> str:
        prompts = read_lines(self.prompts(task, Split.val))[:SHOWN_PROMPTS]
        tiles: list[str] = []
        for number, prompt in enumerate(prompts):
            results = [models[model]["answers"][number] for model in MODELS]
            images = "".join(
                picture_tag(self._drawn(task, model) / result["picture"])
                if result["picture"]
                else "<p>no picture</p>"
                for model, result in zip(MODELS, results, strict=True)
            )
            marks = "".join(
                f'<span class="{"yes" if result["share"] == 1 else "no"}">{when} '
                f"{result['share']:.0%}</span>"
                for when, result in zip(MODELS.values(), results, strict=True)
            )
            tiles.append(
                f'<div class="tile"><div class="images">{images}</div><div class="caption" '
                f'lang="{prompt["language"]}">{escape(prompt["prompt"])}</div>'
                f'<div class="marks">{marks}</div></div>'
            )
        return f'<p><b>{escape(TASKS[task])}</b></p><div class="pairs">{"".join(tiles)}</div>'

    def _drawn(self, task: str, model: str) -> Path:
        return self.out / "rewarded" / f"{task}_{model}"


def _write_lines(path: Path, prompts: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))


def _judged(
    prompts: Sequence[Mapping[str, Any]], *, task: str, pictures: Mapping[str, Path]
) -> dict[str, Any]:
    """What the reward of ``task`` says of every prompt's picture, as shares in [0, 1]: of each, of
    all (``share``), and of those that are right as a whole (``whole``)."""
    from emu35.config.reward import SceneRewardConfig
    from emu35.config.reward_local import OcrRewardConfig
    from emu35.rewards.ocr import OcrReward
    from emu35.rewards.sample import Sample
    from emu35.rewards.scene import SceneReward

    judge = OcrReward(OcrRewardConfig()) if task == "words" else SceneReward(SceneRewardConfig())
    samples = [
        Sample(
            record=prompt,
            task="t2i",
            prompt=prompt["prompt"],
            texts=[""],
            pictures=[pixels_of(pictures[prompt["id"]])] if prompt["id"] in pictures else [],
        )
        for prompt in prompts
    ]
    # Without a picture nothing is right; a reward would call it unscored.
    shares = [
        float(share) if isinstance(share, int | float) else 0.0 for share in judge.score(samples)
    ]
    return {
        "share": sum(shares) / len(shares),
        "whole": sum(share == 1 for share in shares) / len(shares),
        "answers": [
            {
                "picture": pictures[prompt["id"]].name if prompt["id"] in pictures else None,
                "share": share,
            }
            for prompt, share in zip(prompts, shares, strict=True)
        ],
    }
