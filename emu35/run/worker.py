"""What every rank executes: ``python -m emu35.run.worker RUN_DIR``.

The rank reads the folder's ``config.yaml``, which the launching host validated, and calls the
stage. Errors of a user end in one message and an exit code; anything else is a bug and keeps its
traceback.
"""

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from emu35.config.io import read_config
from emu35.config.root import RunConfig
from emu35.errors import Emu35Error, LaunchError
from emu35.run.memory import keep_freed_memory
from emu35.run.rundir import locked

LAUNCHER_PID = "EMU35_LAUNCHER_PID"
"""Set by the local launcher, which holds the folder's lock and whose end must be the ranks' end."""

SUPERVISOR_PID = "EMU35_SUPERVISOR_PID"
"""Set by our launcher of torchrun, which answers for the ranks but holds no lock: rank 0 does."""

DETERMINISTIC_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
)
"""What ``deterministic: true`` sets, where the user has not."""

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent dies."""


def _pretrain(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages import pretrain

    return pretrain.run(config, run_dir=run_dir)


def _sft(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages import sft

    return sft.run(config, run_dir=run_dir)


def _dida(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages import dida

    return dida.run(config, run_dir=run_dir)


def _dida_eval(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages.dida_eval import stage

    return stage.run(config, run_dir=run_dir)


def _ibq(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages.ibq import stage

    return stage.run(config, run_dir=run_dir)


def _tokenizer_eval(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages.tokenizer_eval import stage

    return stage.run(config, run_dir=run_dir)


def _grpo(config: RunConfig, run_dir: Path) -> object:
    from emu35.stages.grpo import stage

    return stage.run(config, run_dir=run_dir)


STAGES: Mapping[str, Callable[[RunConfig, Path], object]] = MappingProxyType(
    {
        "pretrain": _pretrain,
        "sft": _sft,
        "dida": _dida,
        "dida_eval": _dida_eval,
        "grpo": _grpo,
        "ibq": _ibq,
        "tokenizer_eval": _tokenizer_eval,
    }
)
"""``stage.kind`` -> the function that runs it; each imports its stage only when called."""


def run_stage(config: RunConfig, *, run_dir: Path) -> None:
    """Run the configured stage in this process.

    Raises:
        Emu35Error: whatever the stage reports; Interrupted when it was stopped and saved.
    """
    limit_threads(config)
    quiet_libraries()
    keep_freed_memory()
    if config.deterministic:
        be_deterministic()
    stage = STAGES.get(config.stage.kind)
    if stage is None:
        raise LaunchError(
            f"stage.kind={config.stage.kind} cannot be run; use one of {', '.join(STAGES)}"
        )
    stage(config, run_dir)


def limit_threads(config: RunConfig) -> None:
    """Give torch its share of this host's cores; to be called before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads_per_rank(config))


def be_deterministic() -> None:
    """Let torch, cuBLAS, NCCL and transformer-engine choose only what gives the same bits again;
    to be called before torch is imported, since each reads its variable when it starts.

    An operation that has no such form raises an error that names it. The model is built with
    megatron-core's ``deterministic_mode`` whenever torch is in this mode.
    """
    for name, value in DETERMINISTIC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def quiet_libraries() -> None:
    """Silence what torch and megatron-core tell each other about deprecated calls: nothing a user
    can mend, and dozens of lines. ``python -W`` and PYTHONWARNINGS still decide."""
    if sys.warnoptions:
        return
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(torch|megatron|emu35\.parallel\.cpu)(\.|$)"
        )


def threads_per_rank(config: RunConfig) -> int:
    """``launch.threads``; if 0, what OMP_NUM_THREADS says; else an equal share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if config.launch.threads:
        return config.launch.threads
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // config.launch.nproc)


def rank_environment(config: RunConfig) -> dict[str, str]:
    """What a launcher hands to every rank: this process's variables, and ``launch.env``."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads_per_rank(config)),
        "PYTHONUNBUFFERED": "1",
        **config.launch.env,
    }
    if sys.platform == "linux" and config.launch.nodes == 1:
        # Where the host's own name does not resolve (containers), gloo finds no interface.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank to its end; returns the exit code."""
    try:
        run(Path((sys.argv[1:] if arguments is None else arguments)[0]))
    except Emu35Error as error:
        return tell(error)
    return 0


def run(run_dir: Path) -> None:
    """Run the stage of the prepared folder ``run_dir`` on this rank.

    Raises:
        Emu35Error: as :func:`run_stage`; LaunchError if another run holds the folder.
    """
    config = read_config(run_dir)
    if LAUNCHER_PID in os.environ:
        end_with(int(os.environ[LAUNCHER_PID]))
        run_stage(config, run_dir=run_dir)
    elif os.environ.get("RANK", "0") == "0":
        # torchrun and Slurm start ranks without our launcher: rank 0 keeps others out.
        with locked(run_dir, owner=int(os.environ.get(SUPERVISOR_PID, os.getpid()))):
            run_stage(config, run_dir=run_dir)
    else:
        run_stage(config, run_dir=run_dir)


def tell(error: Emu35Error) -> int:
    """Print ``error`` for the user; returns its exit code."""
    print(f"emu35: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def end_with(launcher: int) -> None:
    """Ask the kernel to kill this rank when its parent ``launcher`` dies: nobody else would
    notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the request above
        leave(1)


def leave(code: int) -> NoReturn:
    """End without the interpreter's goodbye, which can hang on a broken process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_rank(entry: Callable[[], int]) -> NoReturn:
    """Call ``entry`` and end this process with the exit code it returns."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        code = entry()
    except KeyboardInterrupt:
        leave(130)
    except BaseException as error:
        if ranks == 1:
            raise
        traceback.print_exception(error)
        leave(1)
    if code and ranks > 1:
        # Other ranks may be inside a collective that this one will never join.
        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    end_rank(main)
