"""One command in several tensor-parallel ranks of this host, as ``emu35 generate --tp 2`` runs.

The command line is executed again by every rank, so a command says in one place that it can do so::

    if (code := in_ranks(arguments.tp)) is not None:
        return code

The first process comes back from there with the exit code when all is over, and a rank goes on with
the command itself. Rank 0 leads: it has the terminal, the signals that ask it to stop, and the last
word; the others print into files that are shown only when one of them fails, ignore such signals,
and end with rank 0. A command must therefore write its results on rank 0 alone. All ranks get the
same arguments, and where they go on by what they read elsewhere, rank 0 has to share it.

The ranks are local ones (:mod:`emu35.run.local_ranks`) rather than torchrun's, which would give
exit code 1 for any other and end the ranks by itself at Ctrl-C. Started below torchrun, with as
many ranks, the same command works as well.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emu35.config.launch import LaunchConfig
from emu35.config.root import RunConfig
from emu35.errors import ConfigError, LaunchError
from emu35.run.local_ranks import run_ranks
from emu35.run.worker import LAUNCHER_PID, end_with

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def in_ranks(tp: int, *, command: Sequence[str] | None = None) -> int | None:
    """See to it that this command runs in ``tp`` ranks.

    Args:
        tp: how many; 1 starts nothing.
        command: what a rank executes, by default this very command line.

    Returns:
        None where the caller is to go on with its work: it is alone, or one of the ranks. Else the
        exit code of the command, which has ended: that of rank 0, 128 + n after signal n.

    Raises:
        ConfigError: ``tp`` is no number of ranks.
        LaunchError: a rank other than 0 failed, or another number of ranks was started.
    """
    if tp < 1:
        raise ConfigError(f"tp={tp} is no number of ranks; use 1 or more")
    started = os.environ.get("WORLD_SIZE")
    if started is not None:
        if int(started) != tp:
            raise LaunchError(
                f"tp={tp}, but {started} ranks were started (WORLD_SIZE); start as many as tp "
                "says, or run the command without torchrun"
            )
        _become_rank()
        return None
    if tp == 1:
        return None
    with tempfile.TemporaryDirectory(prefix="emu35-") as folder:
        return run_ranks(
            RunConfig(launch=LaunchConfig(nproc=tp)),
            run_dir=Path(folder),
            command=command or [sys.executable, "-m", "emu35", *sys.argv[1:]],
            led=True,
        )


def _become_rank() -> None:
    if LAUNCHER_PID not in os.environ:
        return  # torchrun answers for this one
    end_with(int(os.environ[LAUNCHER_PID]))
    if os.environ["RANK"] != "0":
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
