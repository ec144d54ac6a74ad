"""Running a script on one or several gloo ranks, and leaving none behind."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def run_ranks(words: Sequence[str], *, ranks: int, timeout: float) -> str:
    """Python with ``words`` (a script or ``-m MODULE``, and arguments), alone or below torchrun;
    what it printed. Fails with that when the exit code is not 0."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # As in pytest's own process: what tests share lies in the top folder of the tests.
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [*command, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            # Ranks have sessions of their own: a signal to torchrun's group would miss them.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()
    assert process.returncode == 0, output
    return output
