"""The logger of a run: throughput, which steps become rows, and the order of the sinks."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from emu35.config.log import LogConfig, WandbMode
from emu35.log.console import Console, human_count, human_time
from emu35.log.curves import CURVES_FILE, CurvesFile
from emu35.log.jsonl import MetricsFile, Row, null_safe
from emu35.log.sinks import Guarded, Sink, TensorBoardSink, WandbSink

METRICS_FILE = "metrics.jsonl"


def is_row(step: int, *, every: int, total: int) -> bool:
    """Whether ``step`` of ``total`` becomes a row: the first, each ``every``-th and the last."""
    return step % every == 0 or step in (1, total)


class MetricLogger:
    """Reports a run from rank 0.

    Args:
        config: what to write and how often.
        run_dir: gets ``metrics.jsonl``, ``curves.html``, ``tensorboard/`` and ``wandb/``.
        name: of the run, for wandb.
        total_steps: of the whole run, for progress and ETA.
        start_step: the step a resumed run continues from; later rows are removed.
    """

    def __init__(
        self, *, config: LogConfig, run_dir: Path, name: str, total_steps: int, start_step: int = 0
    ) -> None:
        self._every, self._total = config.every, total_steps
        self._console = Console(stream=sys.stdout)
        self._sinks = self._open_sinks(
            config=config, run_dir=run_dir, name=name, start_step=start_step
        )
        now = time.perf_counter()
        self._began, self._start_step = now, start_step
        self._window_began, self._window_aside, self._window_tokens = now, 0.0, 0.0
        self._last_line = f"step {start_step}/{total_steps}"

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report training step ``step`` (counted from 1), to be called for every step.

        ``metrics`` may hold any numbers; ``tokens``, those of this step over all ranks, gives
        ``tokens_per_s`` since the previous row, time spent in :meth:`aside` not counted. Rows are
        the first step, every ``log.every`` steps and the last one; the values of a row are those
        of its own step, so that a resumed run writes the same rows as one that never stopped.
        """
        self._window_tokens += metrics.get("tokens", 0.0)
        due = is_row(step, every=self._every, total=self._total)
        if due or self._console.live:
            self._last_line = self._describe(step, metrics)
            self._console.progress(self._last_line, force=due)
        if due:
            row = {"step": step, **metrics}
            if "tokens" in metrics:
                row["tokens_per_s"] = self._rate()
            self._write(row)
            if not self._console.live:
                self._console.line(self._last_line)
            self._open_window()

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report what validation found after ``step``; keys get the prefix ``val/``."""
        named = {
            key if key.startswith("val/") else f"val/{key}": value for key, value in metrics.items()
        }
        self._write({"step": step, **named})
        shown = "  ".join(f"{key} {value:.4f}" for key, value in named.items())
        self._console.line(f"step {step}/{self._total}  {shown}")

    def message(self, text: str) -> None:
        """Tell the person watching something in words."""
        self._console.line(text)

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Mark time that is not training ("validating"): shown, and left out of the throughput."""
        began = time.perf_counter()
        self._console.progress(f"{self._last_line}  {what} ...", force=True)
        try:
            yield
        finally:
            self._window_aside += time.perf_counter() - began

    def flush(self) -> None:
        """Make every row durable; the trainer does this before it writes a checkpoint."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Finish every sink. The logger cannot be used afterwards."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        self._console.close()

    def _open_sinks(
        self, *, config: LogConfig, run_dir: Path, name: str, start_step: int
    ) -> list[Sink]:
        warn = self._console.line
        sinks: list[Sink] = [
            MetricsFile(path=run_dir / METRICS_FILE, start_step=start_step, warn=warn),
            # After the record, which drops what an interrupted attempt wrote after start_step.
            Guarded(
                name=CURVES_FILE,
                build=lambda: CurvesFile(
                    run_dir=run_dir,
                    metrics=run_dir / METRICS_FILE,
                    name=name,
                    total_steps=self._total,
                ),
                warn=warn,
            ),
        ]
        if config.tensorboard:
            sinks.append(
                Guarded(
                    name="TensorBoard",
                    build=lambda: TensorBoardSink(run_dir=run_dir, start_step=start_step),
                    warn=warn,
                )
            )
        if config.wandb is not WandbMode.off:
            sinks.append(
                Guarded(
                    name=f"wandb ({config.wandb.value})",
                    build=lambda: WandbSink(config=config, run_dir=run_dir, name=name),
                    warn=warn,
                )
            )
        return sinks

    def _write(self, values: Mapping[str, float]) -> None:
        row: Row = null_safe(values)
        for sink in self._sinks:
            sink.write(row)

    def _open_window(self) -> None:
        self._window_began = time.perf_counter()
        self._window_aside, self._window_tokens = 0.0, 0.0

    def _rate(self) -> float:
        """Tokens per second of training since the last row."""
        seconds = time.perf_counter() - self._window_began - self._window_aside
        return self._window_tokens / max(seconds, 1e-9)

    def _describe(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step:{len(str(self._total))}d}/{self._total}"]
        parts.append(f"loss {metrics.get('loss', math.nan):.4f}")
        if "lr" in metrics:
            parts.append(f"lr {metrics['lr']:.2e}")
        if "tokens" in metrics:
            parts.append(f"{human_count(self._rate())} tokens/s")
        done = step - self._start_step
        if done > 0 and step < self._total:
            elapsed = time.perf_counter() - self._began
            parts.append(f"ETA {human_time(elapsed / done * (self._total - step))}")
        return "  ".join(parts)


class SilentLogger:
    """The same methods on ranks that do not report."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def validation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def message(self, text: str) -> None: ...

    def aside(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def flush(self) -> None: ...

    def close(self) -> None: ...


Logger = MetricLogger | SilentLogger


def make_logger(
    *,
    config: LogConfig,
    run_dir: Path,
    name: str,
    total_steps: int,
    start_step: int = 0,
    rank: int = 0,
) -> Logger:
    """The logger of this rank: rank 0 reports, every other one is silent and touches no file."""
    if rank != 0:
        return SilentLogger()
    return MetricLogger(
        config=config, run_dir=run_dir, name=name, total_steps=total_steps, start_step=start_step
    )
