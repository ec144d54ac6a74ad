"""The demo: corpus, image tokenizer, shards, language model, pictures, release, report.

Called by ``scripts/demo.sh`` in an environment where emu35 is installed. Every step is a function
below; what a step runs is printed as the ``emu35`` command that a person could type instead.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budget import BUDGETS, Budget
from emu35.errors import Emu35Error
from parallel import Parallel
from rewarded import Rewarded
from steps import Runner, Step, Stopped, duration, say, shown, write_json, write_text
from tuning import Tuning

SEED = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Where everything lies, and one method a step."""

    out: Path
    budget: Budget
    budget_name: str
    runner: Runner

    @property
    def steps(self) -> list[Step]:
        tuning, parallel, rewarded = self.tuning, self.parallel, self.rewarded
        return [
            Step(name="corpus", title="writing pictures, captions and text", run=self.corpus),
            Step(name="tokenizer", title="training the image tokenizer", run=self.tokenizer),
            Step(name="ingest", title="turning everything into token shards", run=self.ingest),
            Step(name="pretrain", title="pretraining the language model", run=self.pretrain),
            Step(name="generate", title="drawing held-out captions", run=self.generate),
            Step(name="tasks", title="writing and ingesting tasks", run=tuning.tasks),
            Step(name="sft", title="fine-tuning on the tasks", run=tuning.sft),
            Step(name="lora", title="fine-tuning adapters alone", run=tuning.lora),
            Step(name="answer", title="answering held-out tasks", run=tuning.answer),
            Step(name="dida", title="adapting to parallel decoding", run=parallel.adapt),
            Step(name="compare", title="drawing captions both ways", run=parallel.compare),
            Step(name="grpo", title="learning from rewards", run=rewarded.learn),
            Step(name="judge", title="drawing before and after rewards", run=rewarded.judge),
            Step(name="release", title="writing and checking the release", run=self.release),
            Step(name="report", title="summary and report", run=self.report),
        ]

    @property
    def tuning(self) -> Tuning:
        return Tuning(
            out=self.out, budget=self.budget, runner=self.runner, seed=SEED, vision=self.vision
        )

    @property
    def parallel(self) -> Parallel:
        return Parallel(out=self.out, budget=self.budget, runner=self.runner, tuning=self.tuning)

    @property
    def rewarded(self) -> Rewarded:
        return Rewarded(out=self.out, budget=self.budget, runner=self.runner, tuning=self.tuning)

    # ------------------------------------------------------------------ where things lie

    @property
    def corpora(self) -> Path:
        return self.out / "corpus"

    @property
    def prompts(self) -> Path:
        return self.corpora / "heldout.jsonl"

    @property
    def tokenizer_run(self) -> Path:
        return self.out / "ibq"

    @property
    def vision(self) -> Path:
        return self.tokenizer_run / "vision_tokenizer"

    @property
    def shards(self) -> Path:
        return self.out / "shards"

    @property
    def pretrain_run(self) -> Path:
        return self.out / "pretrain"

    @property
    def sft_run(self) -> Path:
        return self.out / "sft"

    @property
    def generated(self) -> Path:
        return self.out / "generated"

    @property
    def release_folder(self) -> Path:
        return self.out / "release"

    @property
    def verification(self) -> Path:
        return self.out / "verification.json"

    # ------------------------------------------------------------------ steps

    def corpus(self) -> None:
        """Scenes and words as tars, clips as JSON lines, photographs as a folder, text as lines,
        and the prompts to test with."""
        from corpus import write_dialogues, write_photos
        from corpus import write_text as write_lines
        from emu35.data.scenes.clips import write_clips
        from emu35.data.scenes.corpus import sample_prompts, write_scenes, write_words
        from emu35.data.scenes.describe import Split

        budget, scenes = self.budget, self.corpora / "scenes"
        for split, count in ((Split.train, budget.train_scenes), (Split.val, budget.val_scenes)):
            write_scenes(
                scenes / f"{split}-00000.tar",
                split=split,
                count=count,
                seed=SEED,
                resolution=budget.resolution,
                progress=lambda done, split=split, count=count: _tell_progress(
                    f"{split} scenes", done=done, total=count
                ),
            )
        write_words(
            scenes / "words-00000.tar",
            count=budget.words,
            seed=SEED,
            resolution=budget.resolution,
        )
        write_clips(
            self.corpora / "clips", count=budget.clips, seed=SEED, resolution=budget.resolution
        )
        photos = write_photos(self.corpora / "photos", crops=budget.crops_per_photo, seed=SEED)
        write_dialogues(
            self.corpora / "text" / "dialogues.jsonl", count=budget.text_lines, seed=SEED
        )
        write_lines(self.corpora / "text" / "plain.txt", lines=budget.text_lines, seed=SEED)
        prompts = sample_prompts(count=budget.prompts, seed=SEED)
        write_text(self.prompts, "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
        say(
            f"  {budget.train_scenes} scenes to train on and {budget.val_scenes} held out, "
            f"{budget.words} words, {budget.clips} clips, {photos} photographs, "
            f"{budget.text_lines} lines of text and as many dialogues, {budget.prompts} prompts"
        )

    def tokenizer(self) -> None:
        """``stage=ibq`` on the training scenes, the words and the photographs."""
        scenes = self.corpora / "scenes"
        paths = [scenes / "train-00000.tar", scenes / "words-00000.tar", self.corpora / "photos"]
        self.runner.emu35(
            "run",
            "experiment=demo/ibq",
            f"run_dir={shown(self.tokenizer_run)}",
            f"data.paths=[{','.join(map(shown, paths))}]",
            f"data.validation_paths=[{shown(scenes / 'val-00000.tar')}]",
            f"data.resolution={self.budget.resolution}",
            *self.budget.tokenizer_overrides,
        )

    def ingest(self) -> None:
        """Captions before pictures (to draw) and after them (to describe), clips, plain text."""
        scenes = self.corpora / "scenes"
        self._ingest("scenes", scenes / "train-00000.tar", "--order", "both")
        self._ingest("clips", self.corpora / "clips" / "clips.jsonl")
        self._ingest("photos", self.corpora / "photos", "--order", "both")
        self._ingest("dialogues", self.corpora / "text" / "dialogues.jsonl")
        self._ingest("text", self.corpora / "text" / "plain.txt", "--text-unit", "lines")
        self._ingest("validation", scenes / "val-00000.tar", "--order", "both")

    def _ingest(self, source: str, path: Path, *options: str) -> None:
        self.runner.emu35(
            "data",
            "ingest",
            shown(path),
            "--out",
            shown(self.shards / source),
            "--source",
            source,
            "--vision",
            shown(self.vision),
            "--codebook-size",
            str(self.tuning.tokenizer_config.n_embed),
            "--area",
            str(self.budget.resolution**2),
            *options,
        )

    def pretrain(self) -> None:
        """``stage=pretrain`` on the mixture."""
        self.runner.emu35(
            "run",
            "experiment=demo/pretrain",
            f"run_dir={shown(self.pretrain_run)}",
            f"tokenizer.vision={shown(self.vision)}",
            f"tokenizer.codebook_size={self.tuning.tokenizer_config.n_embed}",
            *(
                f"data.sources.{name}.path={shown(self.shards / folder)}"
                for name, folder in (
                    ("scenes_t2i", "scenes/caption_first"),
                    ("scenes_i2t", "scenes/image_first"),
                    ("clips", "clips"),
                    ("photos_t2i", "photos/caption_first"),
                    ("photos_i2t", "photos/image_first"),
                    ("text", "text"),
                    ("dialogues", "dialogues"),
                )
            ),
            f"data.validation.t2i.path={shown(self.shards / 'validation/caption_first')}",
            f"data.validation.i2t.path={shown(self.shards / 'validation/image_first')}",
            *self.budget.pretrain_overrides,
        )

    def generate(self) -> None:
        """One picture for each held-out caption, read back by the verifier."""
        from evaluate import evaluate, find_pictures, read_lines

        side = self.budget.resolution // self.tuning.tokenizer_config.factor
        self.runner.emu35(
            "generate",
            "--run",
            shown(self.pretrain_run),
            "--task",
            "t2i",
            "--prompts-file",
            shown(self.prompts),
            "--out",
            shown(self.generated),
            "--size",
            f"{side}x{side}",
            *self.budget.generate_options,
        )
        prompts = read_lines(self.prompts)
        pictures = find_pictures(prompts, folder=self.generated)
        result = evaluate(prompts, pictures=pictures)
        write_json(self.out / "evaluation.json", result)
        got, by_chance = result["accuracy"], result["chance"]
        say(
            f"  colour {got['colour']:.1%} (chance {by_chance['colour']:.1%}), "
            f"shape {got['shape']:.1%} (chance {by_chance['shape']:.1%})"
        )

    def release(self) -> None:
        """Export the fine-tuned model, then compare release and run: names, weights, logits."""
        import shutil

        self.verification.unlink(missing_ok=True)
        if self.release_folder.exists():
            # Ours, from an attempt that was stopped between the two commands.
            shutil.rmtree(self.release_folder)
        run, release = shown(self.sft_run), shown(self.release_folder)
        self.runner.emu35("convert", "export", "--run", run, "--out", release)
        self._verify()

    def _verify(self) -> None:
        """What was compared and how far it differs, kept for the summary once all checks passed."""
        run, release = shown(self.sft_run), shown(self.release_folder)
        found = self.runner.emu35_json(
            "convert", "verify", "--release", release, "--against", run, "--json"
        )
        write_json(self.verification, found)

    def report(self) -> None:
        """``summary.json`` and ``report.html``."""
        from report import Report
        from summary import reconstructions, summarize
        from task_report import TaskSection

        if not self.verification.exists():
            self._verify()
        evaluation = json.loads((self.out / "evaluation.json").read_text())
        tasks = json.loads((self.out / "tasks.json").read_text())
        names = [step.name for step in self.steps]
        summary = summarize(
            evaluation,
            tasks=tasks,
            verification=json.loads(self.verification.read_text()),
            parallel=self.parallel.summary(),
            rewarded=self.rewarded.summary(),
            seconds={name: self.runner.seconds(name) for name in names},
            budget=self.budget_name,
        )
        page = Report(
            summary=summary,
            evaluation=evaluation,
            reconstructions=reconstructions(
                codec_folder=self.vision,
                scenes=self.corpora / "scenes" / "val-00000.tar",
                photos=self.corpora / "photos",
                resolution=self.budget.resolution,
            ),
            tokenizer_run=self.tokenizer_run,
            pretrain_run=self.pretrain_run,
            sft_run=self.sft_run,
            generated=self.generated,
            tasks=TaskSection(tasks=tasks, out=self.out).html(),
            parallel=self.parallel.html(),
            rewarded=self.rewarded.html(),
            commands=self.runner.commands,
        )
        write_text(self.out / "report.html", page.html())
        write_json(self.out / "summary.json", summary)


def _tell_progress(what: str, *, done: int, total: int) -> None:
    if sys.stderr.isatty() and (done % 50 == 0 or done == total):
        end = "\n" if done == total else ""
        print(f"\r\x1b[K  {what} {done}/{total}", end=end, file=sys.stderr, flush=True)
    elif not sys.stderr.isatty() and done % 2000 == 0:
        say(f"  {what} {done}/{total}")


def _refuse(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong arguments or nowhere to write, 75 or 130 stopped (the same
    command goes on)."""
    parser = argparse.ArgumentParser(
        prog="demo.sh", description="From nothing to a trained, checked, released model."
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/demo"), metavar="OUT")
    parser.add_argument("--until", metavar="STEP", help="stop after this step")
    parser.add_argument("--budget", choices=list(BUDGETS), default="default")
    options = parser.parse_args(arguments)
    out: Path = options.out.absolute()
    if out.exists() and not out.is_dir():
        return _refuse(f"{options.out} is a file; name a folder")
    try:
        return _go(out, budget_name=options.budget, until=options.until)
    except Stopped as stop:
        if stop.code in (75, 130):
            say("stopped; the same command goes on from here")
        return stop.code
    except Emu35Error as error:
        return _refuse(str(error))
    except OSError as error:
        if error.strerror is None:
            return _refuse(str(error))
        return _refuse(
            f"{error.filename or options.out}: {error.strerror}; "
            "free some space or make it accessible, then run the same command again"
        )


def _go(out: Path, *, budget_name: str, until: str | None) -> int:
    runner, budget = Runner(out=out), BUDGETS[budget_name]
    settings = {"budget": budget_name, "settings": budget.to_json(), "seed": SEED}
    if differing := runner.claim(settings):
        what = "budget" if "budget" in differing else " and ".join(differing)
        return _refuse(
            f"{shown(out)} holds a demo with another {what}; "
            "choose another folder or remove that one"
        )
    demo = Demo(out=out, budget=budget, budget_name=budget_name, runner=runner)
    names = [step.name for step in demo.steps]
    if until is not None and until not in names:
        return _refuse(f"--until {until} names no step; the steps are {', '.join(names)}")
    runner.catch_signals()
    runner.run(demo.steps, until=until)
    if until in (None, "report"):
        summary = json.loads((out / "summary.json").read_text())
        say(
            f"\ndone in {duration(summary['seconds'])}: colour {summary['colour_accuracy']:.0%}, "
            f"shape {summary['shape_accuracy']:.0%}; tasks {summary['tasks_pretrain']:.0%} before "
            f"fine-tuning, {summary['tasks_sft']:.0%} after\nopen {shown(out / 'report.html')}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
