"""``emu35 convert export|import|verify|reshard|tokenizer``: between a run and the official release
formats, from a run to one of another layout, and the image tokenizer alone."""

import argparse
import json
import sys
from pathlib import Path

from emu35.errors import ReleaseError
from emu35.run.arguments import Commands
from emu35.run.arguments.tokenizer import KINDS, tokenizer_config

DTYPES = ("fp32", "bf16")
TEMPLATES = ("official", "plain")
NEW_ROWS = ("mean", "normal")
LAYOUTS = ("official", "hf")


def add(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Describe the subcommand."""
    text = (
        "a run to a release, a release (or Qwen3) to a run, the proof that they are equal, a run "
        "to another layout, and an image tokenizer to another format"
    )
    actions = commands.add_parser("convert", help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )
    _add_export(actions)
    _add_import(actions)
    _add_verify(actions)
    _add_reshard(actions)
    _add_tokenizer(actions)


def _add_export(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "write the release of a run in the official formats"
    command = actions.add_parser("export", help=text, description=text)
    command.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder")
    command.add_argument("--out", type=Path, required=True, metavar="REL", help="folder to make")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights (default: as trained)"
    )
    _add_template(command)
    command.add_argument(
        "--max-shard-bytes", type=int, metavar="N", help="split the weights above this size"
    )
    command.set_defaults(handler=_export)


def _add_import(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "read a release, or a Qwen3 folder as published, into a run folder at step 0"
    command = actions.add_parser("import", help=text, description=text)
    command.add_argument(
        "--from", type=Path, required=True, dest="source", metavar="DIR", help="folder to read"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument(
        "--tokenizer", choices=KINDS, help="replaces the one that the release brings or implies"
    )
    command.add_argument("--codebook-size", type=int, metavar="N", help="number of visual codes")
    command.add_argument("--table", metavar="FILE", help="text table of the emu35 tokenizer")
    command.add_argument("--vision", type=Path, metavar="DIR", help="image tokenizer to take along")
    _add_template(command)
    command.add_argument(
        "--new-rows",
        choices=NEW_ROWS,
        default="mean",
        help="where vocabulary rows start that Qwen3 does not have: the mean of the text rows plus "
        "noise (default), or noise alone",
    )
    command.add_argument(
        "--new-rows-std",
        type=float,
        default=0.02,
        metavar="X",
        help="standard deviation of that noise (default 0.02)",
    )
    command.add_argument(
        "--seed", type=int, default=1234, help="draws that noise (default 1234, as of a run)"
    )
    command.set_defaults(handler=_import)


def _add_verify(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "compare names, shapes, hashes, weights and logits of a release"
    command = actions.add_parser("verify", help=text, description=text)
    command.add_argument("--release", type=Path, required=True, metavar="DIR")
    reference = command.add_mutually_exclusive_group()
    reference.add_argument("--against", type=Path, metavar="DIR", help="another release, or a run")
    reference.add_argument(
        "--run", type=Path, dest="against", metavar="DIR", help="the run that it was exported from"
    )
    command.add_argument("--step", type=int, metavar="N", help="checkpoint of the run")
    command.add_argument(
        "--probe-tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of the sequences whose logits are compared; 0: no logits (default 64)",
    )
    command.add_argument(
        "--transformers",
        action="store_true",
        help="also compare with what the transformers library builds, if it is installed",
    )
    command.add_argument(
        "--json", action="store_true", help="one JSON object; the report goes to stderr"
    )
    command.set_defaults(handler=_verify)


def _add_reshard(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = (
        "a checkpoint of a run as a run folder of its own, for another layout, checked; one "
        "process, and memory for its largest piece"
    )
    command = actions.add_parser("reshard", help=text, description=text)
    command.add_argument("--run", type=Path, required=True, metavar="DIR", help="run folder")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="type of the parameters (default: as trained)"
    )
    command.add_argument(
        "--weights-only", action="store_true", help="leave the optimizer out, for init_from"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what changes, such as parallel.tp=2 parallel.zero1=true",
    )
    command.set_defaults(handler=_reshard)


def _add_tokenizer(actions: "Commands[argparse.ArgumentParser]") -> None:
    text = "an image tokenizer to the official or the Hugging Face layout, read again and compared"
    command = actions.add_parser("tokenizer", help=text, description=text)
    command.add_argument(
        "--from",
        type=Path,
        required=True,
        dest="source",
        metavar="DIR",
        help="its folder in either layout, or a run of stage=ibq or a release that holds it",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    command.add_argument(
        "--format",
        choices=LAYOUTS,
        required=True,
        help="official: config.yaml and model.ckpt; hf: config.json and model.safetensors",
    )
    command.set_defaults(handler=_tokenizer)


def _add_template(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--template",
        choices=TEMPLATES,
        help="prompts the model knows (default: plain after pretraining, else official)",
    )


def _export(arguments: argparse.Namespace) -> int:
    from emu35.checkpoint.safetensor_files import SHARD_BYTES
    from emu35.config import Precision
    from emu35.stages.release import ExportOptions, export
    from emu35.tokens.template import PromptTemplate

    shard_bytes: int | None = arguments.max_shard_bytes
    if shard_bytes is not None and shard_bytes < 1:
        raise ReleaseError(f"--max-shard-bytes {shard_bytes} must be at least 1")
    export(
        ExportOptions(
            run=arguments.run,
            out=arguments.out,
            step=arguments.step,
            dtype=Precision(arguments.dtype) if arguments.dtype else None,
            template=PromptTemplate(arguments.template) if arguments.template else None,
            max_shard_bytes=shard_bytes or SHARD_BYTES,
        )
    )
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from emu35.config.stage import NewRows, NewRowsConfig
    from emu35.stages.release import ImportOptions, import_
    from emu35.tokens.template import PromptTemplate

    asked = (arguments.tokenizer, arguments.codebook_size, arguments.table)
    if arguments.tokenizer is None:
        # Only the released table is ever implied; naming a part of a tokenizer means that one.
        arguments.tokenizer = "emu35"
    if not arguments.new_rows_std >= 0:
        raise ReleaseError(f"--new-rows-std {arguments.new_rows_std} must be at least 0")
    import_(
        ImportOptions(
            source=arguments.source,
            out=arguments.out,
            tokenizer=tokenizer_config(arguments) if any(asked) else None,
            vision=arguments.vision,
            template=PromptTemplate(arguments.template) if arguments.template else None,
            new_rows=NewRowsConfig(policy=NewRows(arguments.new_rows), std=arguments.new_rows_std),
            seed=arguments.seed,
        )
    )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from emu35.stages.release_verify import (
        VerifyOptions,
        require_passed,
        run_checks,
        verification_json,
        verify,
    )

    options = VerifyOptions(
        release=arguments.release,
        against=arguments.against,
        step=arguments.step,
        probe_tokens=arguments.probe_tokens,
        transformers=arguments.transformers,
    )
    if not arguments.json:
        verify(options)
        return 0
    checks = run_checks(options, message=_report)
    print(json.dumps(verification_json(checks)), flush=True)
    require_passed(checks, release=options.release)
    return 0


def _reshard(arguments: argparse.Namespace) -> int:
    from emu35.config import Precision
    from emu35.config.io import read_config
    from emu35.run.compose import adapt
    from emu35.stages.reshard import ReshardOptions, reshard

    config = adapt(read_config(arguments.run), arguments.overrides)
    reshard(
        ReshardOptions(
            run=arguments.run,
            out=arguments.out,
            config=config,
            step=arguments.step,
            dtype=Precision(arguments.dtype) if arguments.dtype else None,
            weights_only=arguments.weights_only,
        )
    )
    return 0


def _tokenizer(arguments: argparse.Namespace) -> int:
    from emu35.stages.convert_tokenizer import ConvertTokenizerOptions, convert_tokenizer
    from emu35.vision.ibq.folder import Layout

    convert_tokenizer(
        ConvertTokenizerOptions(
            source=arguments.source, out=arguments.out, layout=Layout(arguments.format)
        )
    )
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
