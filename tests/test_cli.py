"""The command line as a user meets it: output, messages, exit codes, and what it imports."""

import io
import json
import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from emu35.cli import build_parser, main
from emu35.run.arguments import convert, data, generate, source, tokenizer
from emu35.run.arguments import ingest as ingest_arguments


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def in_subprocess(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["generate", "--help"],
        ["serve", "--help"],
        ["view", "--help"],
        ["dida", "fit-path", "--help"],
        ["data", "distill", "--help"],
        ["data", "inspect", "--help"],
        ["data", "validate", "--help"],
        ["show", "experiment=demo/pretrain", "--diff"],
        ["plan", "experiment=emu35_34b/pretrain_s1", "--json"],
        ["launch", "experiment=emu35_34b/sft_s1", "--dry-run"],
        ["show", "stage.stpes=1"],
    ],
)
def test_light_commands_import_no_heavy_package(arguments: list[str]):
    code = (
        "import contextlib, sys; from emu35.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})\n"
        "heavy = {'torch', 'megatron', 'transformers', 'wandb', 'tiktoken'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = in_subprocess(code)
    assert done.returncode == 0, done.stderr


def test_show_prints_what_config_yaml_would_hold(capsys):
    assert main(["show", "experiment=demo/pretrain", "optim.lr=3e-4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optim"]["lr"] == 3e-4
    assert shown["run_dir"] == "runs/demo_pretrain"


def test_options_and_overrides_mix(capsys):
    assert main(["show", "stage.steps=5", "--diff", "optim.lr=1e-2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["stage.steps: 100 -> 5", "optim.lr: 0.0003 -> 0.01"]


def test_plan_is_one_json_object(capsys):
    assert main(["plan", "experiment=emu35_34b/pretrain_s1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 34_103_460_864
    assert plan["tokens_per_step"] == 448 * 32768
    assert plan["memory_bytes_per_rank"]["total"] > 0


@pytest.mark.parametrize("command", ["show", "plan", "run", "launch"])
def test_a_mistake_is_a_message_and_exit_code_2(command: str, capsys):
    assert main([command, "stage.stpes=5", "optim.lr=fast"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("emu35: 2 problems in the configuration:")
    assert "Did you mean 'steps'?" in captured.err


def test_run_without_data_says_so_and_makes_nothing(tmp_path: Path, capsys):
    assert main(["run", f"run_dir={tmp_path}/run"]) == 2
    assert "data.sources is empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["shwo"], ["show", "--dift"], ["tokens"], ["data", "x"]])
def test_usage_errors(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: emu35" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m emu35 show experiment=emu35_34b/pretrain_s1 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "name: emu35_34b_pretrain_s1\n"
    assert done.stderr == ""


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk_behind_the_output_is_one_line(unbuffered: bool):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-m", "emu35", "show"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
        wrong = subprocess.run(
            [*command, "stage.stpes=1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == (
        "emu35: cannot write the output: No space left on device; "
        "free some space or write elsewhere\n"
    )
    assert wrong.returncode == 2
    assert "Did you mean 'steps'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_ctrl_c_has_no_traceback():
    code = (
        "import sys, emu35.run.start as start; from emu35.cli import main\n"
        "def stop(config): raise KeyboardInterrupt\n"
        "start.run_here = stop\n"
        "sys.exit(main(['run']))"
    )
    done = in_subprocess(code)
    assert done.returncode == 130
    assert done.stderr == "emu35: stopped\n"


def test_texts_go_to_ids_and_back(monkeypatch, capsys):
    lines = b'{"text": "caf\xc3\xa9 <|image start|>"}\n\n{"parts": [{"codes": [[1, 2]]}]}\n'
    monkeypatch.setattr(sys, "stdin", Stdin(lines))
    assert main(["tokens", "encode", "--codebook-size", "4"]) == 0
    encoded = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", Stdin(b"\xef\xbb\xbf" + lines))
    assert main(["tokens", "encode", "--codebook-size", "4"]) == 0
    assert capsys.readouterr().out == encoded
    first, second = (json.loads(line)["ids"] for line in encoded.splitlines())
    assert bytes(first).decode() == "caf\u00e9 <|image start|>"
    assert max(second) > 256
    monkeypatch.setattr(sys, "stdin", Stdin(encoded.encode()))
    assert main(["tokens", "decode", "--codebook-size", "4"]) == 0
    decoded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert decoded[0] == {"text": "caf\u00e9 <|image start|>"}
    assert decoded[1]["parts"] == [{"codes": [[1, 2]]}]


def test_specials_inside_text_are_parsed_only_on_demand(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Stdin(b'{"text": "<|image start|>"}'))
    assert main(["tokens", "encode", "--allow-special"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\n", "line 1 is not UTF-8"), (b"{}\n[", "line 1: found no key"), (b"{", "not JSON")],
)
def test_bad_lines_are_named(content: bytes, message: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert main(["tokens", "encode"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", '{"text": "a"}', "{", '{"prompt": 3}'])
def test_prompts_file_with_a_bad_line(content: str, tmp_path: Path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{content}\n')
    arguments = ["--run", str(tmp_path), "--out", str(tmp_path), "--prompts-file", str(file)]
    assert main(["generate", *arguments]) == 2
    assert "prompts.jsonl, line 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "export", "--run", "{}/no", "--out", "{}/rel"], "no"),
        (["convert", "import", "--from", "{}/no", "--out", "{}/run"], "no"),
        (["convert", "verify", "--release", "{}/no"], "no"),
        (["generate", "--run", "{}/no", "--out", "{}/o", "--prompt", "x"], "no"),
        (["generate", "--run", "{}", "--out", "{}/o"], "no prompt"),
        (["generate", "--run", "{}", "--out", "{}/o", "--prompt", "x", "--size", "9"], "no grid"),
        (["data", "ingest", "{}/no", "--out", "{}/o"], "no"),
        (["data", "ingest", "{}", "--out", "{}/o", "--area", "big"], "area 'big' is no area"),
        (["data", "index", "{}/no"], "no"),
        (["data", "stats", "{}/no"], "no"),
        (["data", "inspect", "{}/no"], "no"),
        (["dida", "fit-path", "--vision", "{}/no", "--out", "{}/o"], "no vision tokenizer in"),
    ],
)
def test_missing_inputs_are_messages(arguments: list[str], message: str, tmp_path: Path, capsys):
    assert main([word.format(tmp_path) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("emu35: ")
    assert message in captured.err
    assert not (tmp_path / "rel").exists()


def test_the_schema_of_tasks_is_printed(capsys):
    from emu35.data.readers.task_table import TASK_FORMS

    assert main(["data", "tasks"]) == 0
    everything = capsys.readouterr().out
    assert everything.startswith("A record is a JSON object on a line")
    for task, form in TASK_FORMS.items():
        assert main(["data", "tasks", task.value]) == 0
        printed = capsys.readouterr().out
        assert printed in everything
        assert json.loads(printed.splitlines()[-1]) == {"task": task.value, **form.example}
    with pytest.raises(SystemExit, match="2"):
        main(["data", "tasks", "painting"])
    assert "invalid choice: 'painting' (choose from" in capsys.readouterr().err


def test_choices_are_those_of_the_packages_that_read_them():
    from emu35.config import Precision, TokenizerKind
    from emu35.data.ingest.options import Dedup, PairOrder
    from emu35.data.readers.benchmarks import Layout
    from emu35.data.readers.discover import TextUnit
    from emu35.data.readers.task_documents import Starts
    from emu35.data.readers.task_table import TASK_FORMS
    from emu35.dida.samplers import Sampler
    from emu35.tokens.template import PromptTemplate, Task

    def values(kind: type[StrEnum]) -> set[str]:
        return {member.value for member in kind}

    assert set(tokenizer.KINDS) == values(TokenizerKind)
    assert set(ingest_arguments.ORDERS) == values(PairOrder)
    assert set(ingest_arguments.TEXT_UNITS) == values(TextUnit)
    assert set(ingest_arguments.STARTS) == values(Starts)
    assert tuple(TASK_FORMS) == data.TASKS
    assert set(ingest_arguments.DEDUPS) == values(Dedup)
    assert set(ingest_arguments.LAYOUTS) == values(Layout)
    assert set(generate.TASKS) == values(Task)
    assert set(generate.SAMPLERS) == values(Sampler)
    assert set(source.TEMPLATES) == values(PromptTemplate) | {"auto"}
    assert set(convert.TEMPLATES) == values(PromptTemplate)
    assert set(source.PRECISIONS) == set(convert.DTYPES) == values(Precision)


def test_defaults_are_those_of_the_options_they_fill():
    from emu35.data.ingest.options import IngestOptions
    from emu35.run.arguments.recipe import Recipe
    from emu35.stages.data_stats import StatsOptions
    from emu35.stages.data_validate import ValidateOptions
    from emu35.stages.dida_path import FitPathOptions
    from emu35.stages.generate.options import GenerateOptions
    from emu35.stages.release import VerifyOptions

    def defaults(*words: str) -> dict[str, object]:
        return vars(build_parser().parse_args(words))

    some = Path("x")
    ingest = IngestOptions(inputs=[some], out=some, source="x")
    given = defaults("data", "ingest", "x", "--out", "x")
    names = ["shard_bytes", "images_per_call", "threads", "max_rejects", "workers", "dedup"]
    for name in [*names, "order", "text_unit", "starts", "layout"]:
        assert given[name] == getattr(ingest, name)
    assert ingest_arguments.parse_area(ingest_arguments.AREA) == ingest.area
    assert Recipe().sequence_length == ingest.sequence_length
    assert Recipe().tokenizer == ingest.tokenizer
    stats = defaults("data", "stats", "x")
    assert stats["sequence_length"] == StatsOptions(folders=[]).sequence_length
    validate = defaults("data", "validate", "x")
    assert validate["threads"] == ValidateOptions(folders=[]).threads
    fitted = defaults("dida", "fit-path", "--vision", "x", "--out", "x")
    for name in ("shards", "codes", "seed", "force"):
        assert fitted[name] == getattr(FitPathOptions(vision=some, out=some), name)
    verify = defaults("convert", "verify", "--release", "x")
    assert verify["probe_tokens"] == VerifyOptions(release=some).probe_tokens
    made = defaults("generate", "--run", "x", "--out", "x")
    options = GenerateOptions(source=some, prompts=[], out=some)
    for name in ("seed", "batch_size", "task", "logprobs", "page", "story"):
        assert made[name] == getattr(options, name)
