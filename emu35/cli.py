"""The ``emu35`` command.

Every subcommand's arguments are defined here or in :mod:`emu35.run.arguments`, and its body is
imported when it is called: ``--help``, ``show`` and ``plan`` never import torch.

Exit codes: 0 done; 2 bad configuration or input, or a disk that is full (one message, no
traceback); 75 interrupted and saved, the same command resumes; 130 stopped by Ctrl-C before there
was anything to save; 1 a bug, with its traceback.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from emu35 import __version__
from emu35.errors import Emu35Error
from emu35.run.arguments import Commands, convert, data, dida, generate, serve, tokens, view
from emu35.run.memory import keep_freed_memory
from emu35.run.worker import quiet_libraries

_OVERRIDES = """\
Overrides are key=value: experiment=demo/pretrain chooses an experiment, model=demo the option of a
group, optim.lr=3e-4 a value, ~data.sources.text removes an entry."""

_DEVICE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO})
"""What a disk or a terminal reports, whoever was writing: never a bug of ours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without UTF-8 gets escapes instead of a traceback.
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    keep_freed_memory()
    code = 0
    try:
        code = _answer(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head`).
        _drop_output()
    except OSError as error:
        if error.errno not in _DEVICE_ERRORS:
            raise
        _drop_output()
        where = f"to {error.filename}" if error.filename else "the output"
        _say(f"emu35: cannot write {where}: {error.strerror}; free some space or write elsewhere")
        return 2
    return code


def _answer(argv: Sequence[str] | None) -> int:
    """The exit code of the command, its messages said."""
    try:
        arguments = _parse(argv)
        return arguments.handler(arguments)
    except Emu35Error as error:
        _say(f"emu35: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("emu35: stopped")
        return 130
    except SystemExit:
        # --help and usage errors: what argparse printed is still in the buffer.
        sys.stdout.flush()
        raise


def _say(message: str) -> None:
    # The output first, as a terminal shows both. Where one of the two cannot be written, the other
    # still is, and the exit code tells the rest.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Send what is left in the buffer nowhere, so that the interpreter's last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals only up to the first option: `show a=1 --diff b=2` leaves b=2.
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in arguments]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "overrides" in arguments:
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="emu35", description="Train, run and release Emu3.5-class multimodal models."
    )
    parser.add_argument("--version", action="version", version=f"emu35 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_show(commands)
    _add_plan(commands)
    _add_run(commands)
    _add_launch(commands)
    for module in (generate, serve, view, convert, data, dida, tokens):
        module.add(commands)
    return parser


def _with_overrides(commands: "Commands[argparse.ArgumentParser]", name: str, *, help: str):
    command = commands.add_parser(name, help=help, description=help, epilog=_OVERRIDES)
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see below")
    command.add_argument(
        "--configs", type=Path, metavar="DIR", help="folder of more groups and experiments"
    )
    return command


def _add_show(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = _with_overrides(commands, "show", help="print the resolved configuration")
    command.add_argument("--diff", action="store_true", help="only what departs from defaults")
    command.set_defaults(handler=_show)


def _add_plan(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = _with_overrides(commands, "plan", help="parameters, tokens and memory of a run")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(handler=_plan)


def _add_run(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = _with_overrides(
        commands, "run", help="run or resume on this host: one process, or launch.nproc ranks"
    )
    command.set_defaults(handler=_run)


def _add_launch(commands: "Commands[argparse.ArgumentParser]") -> None:
    command = _with_overrides(
        commands, "launch", help="run where launch.kind says: local, torchrun or slurm"
    )
    command.description = (
        f"{command.description}. `emu35 launch status RUN_DIR` says how a run is, `emu35 launch "
        "cancel RUN_DIR` asks it to save and stop; both also take the run's overrides."
    )
    command.add_argument("--json", action="store_true", help="status: one JSON object")
    command.add_argument(
        "--force", action="store_true", help="cancel: end it at once, without saving"
    )
    command.add_argument("--dry-run", action="store_true", help="print the command or job script")
    command.add_argument(
        "--node-rank", type=int, default=0, metavar="R", help="torchrun: this node's number"
    )
    command.add_argument("--master", metavar="HOST:PORT", help="torchrun: address of node 0")
    command.set_defaults(handler=_launch, usage_error=command.error)


def _show(arguments: argparse.Namespace) -> int:
    from emu35.config.io import departures, to_yaml
    from emu35.config.schema import to_plain
    from emu35.run.compose import compose
    from emu35.run.rundir import without_values

    config = compose(arguments.overrides, configs=arguments.configs)
    if arguments.diff:
        for line in without_values(departures(config)):
            print(line)
    else:
        print(to_yaml(to_plain(config)), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from emu35.planner.plan import describe, make_plan
    from emu35.run.compose import compose

    plan = make_plan(compose(arguments.overrides, configs=arguments.configs))
    print(json.dumps(plan) if arguments.json else describe(plan))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from emu35.run.compose import compose
    from emu35.run.start import run_here

    return run_here(compose(arguments.overrides, configs=arguments.configs))


def _launch(arguments: argparse.Namespace) -> int:
    from emu35.run.compose import compose
    from emu35.run.follow import ACTIONS, check_action

    check_action(arguments.overrides)
    action = next((word for word in arguments.overrides[:1] if word in ACTIONS), "")
    _check_options(arguments, action=action)
    if action:
        return _follow(arguments)
    from emu35.run.start import launch

    return launch(
        compose(arguments.overrides, configs=arguments.configs),
        node_rank=arguments.node_rank,
        master=arguments.master,
        dry_run=arguments.dry_run,
    )


def _check_options(arguments: argparse.Namespace, *, action: str) -> None:
    """End with a usage error where an option belongs to another action of ``emu35 launch``."""
    command = f"emu35 launch {action}".rstrip()
    for option, fits, given in (
        ("--json", action == "status", arguments.json),
        ("--force", action == "cancel", arguments.force),
        ("--dry-run", not action, arguments.dry_run),
    ):
        if given and not fits:
            arguments.usage_error(f"{option} does not go with `{command}`")


def _follow(arguments: argparse.Namespace) -> int:
    from emu35.run.follow import cancel, find_run, status

    action, *words = arguments.overrides
    run_dir = find_run(words, configs=arguments.configs, action=action)
    if action == "cancel":
        print(cancel(run_dir, force=arguments.force))
        return 0
    found = status(run_dir)
    print(json.dumps(found.plain()) if arguments.json else "\n".join(found.lines()))
    return 0
