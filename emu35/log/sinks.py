"""Optional views of the metrics: TensorBoard and Weights & Biases.

Both libraries are imported when asked for, since each takes seconds. Whatever they raise is turned
into one sentence and the view is dropped: no view is worth a training run.
"""

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from emu35.config.log import LogConfig, WandbMode
from emu35.log.jsonl import Row


class Sink(Protocol):
    """Takes rows; every row has ``step``."""

    def write(self, row: Row) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in ``run_dir/tensorboard``.

    ``purge_step`` makes TensorBoard hide what an interrupted attempt wrote after ``start_step``.
    """

    def __init__(self, *, run_dir: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            log_dir=str(run_dir / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, global_step=int(row["step"] or 0))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A wandb run kept in ``run_dir/wandb``; ``offline`` needs neither account nor network.

    The run id is stored beside the files, so that a resumed run continues the same wandb run.
    Steps are an ordinary metric used as the x axis: wandb's own step counter refuses to go back,
    which a run that resumes from an older checkpoint has to.
    """

    def __init__(self, *, config: LogConfig, run_dir: Path, name: str) -> None:
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        import wandb

        self._run: Any = wandb.init(
            project=config.wandb_project,
            name=name,
            id=_run_id(folder / "run_id.txt"),
            resume="allow" if config.wandb is WandbMode.online else None,
            dir=str(run_dir),
            mode="online" if config.wandb is WandbMode.online else "offline",
            # Where no account is known wandb asks on a terminal; ranks wait, so not for long.
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, login_timeout=60),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None})

    def flush(self) -> None:
        """wandb writes by itself."""

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """A sink that may fail: the first failure is told through ``warn`` and ends the sink."""

    def __init__(
        self, *, name: str, build: Callable[[], Sink], warn: Callable[[str], None]
    ) -> None:
        self._name, self._warn = name, warn
        self._sink: Sink | None = None
        with self._guard():
            self._sink = build()

    def write(self, row: Row) -> None:
        with self._guard():
            if self._sink:
                self._sink.write(row)

    def flush(self) -> None:
        with self._guard():
            if self._sink:
                self._sink.flush()

    def close(self) -> None:
        with self._guard():
            if self._sink:
                self._sink.close()
        self._sink = None

    @contextlib.contextmanager
    def _guard(self):
        try:
            yield
        # Foreign code with a network behind it: any exception type may come out, none is ours.
        except Exception as error:
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(
                f"{self._name} is off from here on ({reason}); training goes on and "
                "metrics.jsonl has every row"
            )


def _run_id(path: Path) -> str:
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = uuid.uuid4().hex[:8]
    path.write_text(fresh + "\n")
    return fresh
