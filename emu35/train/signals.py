"""Being asked to stop: a flag for the training loop, and a way out when the loop does not react.

Slurm announces the end of a job with a signal (SIGUSR1 where ``--signal`` says so, else SIGTERM and
30 seconds), torchrun passes SIGTERM on, a person presses Ctrl-C. The first such signal only sets a
flag. The loop looks at it at every step boundary, over all ranks, so that all of them save the
same step. A task whose steps are long looks at it in between (:func:`stop_asked`), and when all of
its ranks have agreed gives the step up (:class:`StepAbandoned`). A second signal leaves at once
with 128 + its number.

The second signal must work even where the main thread is stuck in a collective, and there Python
runs no signal handler. So the interpreter's wake-up descriptor, which the handler written in C
feeds immediately, is read by a thread, and that thread leaves the process.

A launcher may start a rank with stop signals blocked (:mod:`emu35.run.torchrun` does so with
SIGUSR1): then the kernel keeps one that comes before the loop listens until it does.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

from emu35.parallel.collectives import any_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A launcher that forwards a signal which its whole process group received delivers it twice within
# milliseconds. That is one request; a person or a scheduler that means it takes longer.
_SAME_REQUEST_SECONDS = 0.5
# Below torchrun there are more who pass it on, and not all as the same signal: Slurm signals every
# process of a step, torchrun sends SIGTERM for whatever it got, our launcher sends SIGUSR1.
_SAME_REQUEST_SECONDS_TORCHRUN = 5.0


class StepAbandoned(Exception):
    """A step, or a validation, was given up on every rank, because some rank was asked to stop. The
    task is as it was before; a resumed run makes it from its beginning."""


class StopRequest:
    """Context manager: while it is open, stop signals are collected instead of ending the process.

    Previous handlers return on exit. Outside the main thread, where Python allows no handlers, it
    does nothing and no stop is ever requested.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_wakeup = -1
        self._previous_mask: set[int] = set()

    @property
    def received(self) -> signal.Signals | None:
        """The signal that this rank got, if any."""
        return self._received

    def on_any_rank(self) -> bool:
        """Whether some rank was asked to stop, the same answer on all; to be called by all."""
        return any_rank(self._received is not None)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._sockets = (reader, writer)
        self._previous_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        _open_requests.append(self)
        threading.Thread(
            target=self._watch, args=(reader,), name="stop-signals", daemon=True
        ).start()
        self._previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sockets is None:
            return
        _open_requests.remove(self)
        self._restore()
        self._sockets[1].close()  # the watching thread reads the end of the stream and returns
        self._sockets = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._request(number)

    def _watch(self, reader: socket.socket) -> None:
        with reader, contextlib.suppress(OSError):
            while content := reader.recv(64):
                for number in content:
                    if number in STOP_SIGNALS:
                        self._count(number)

    def _count(self, number: int) -> None:
        """Runs in the watching thread, once for every signal delivered."""
        now = time.monotonic()
        if not self._received_at:
            self._received_at = now
            self._request(number)
            name = signal.Signals(number).name
            _say(f"{name}: saving when this step is over or given up, then leaving")
        elif not self._is_copy(number, after=now - self._received_at):
            _say(f"{signal.Signals(number).name} again: leaving at once, nothing saved")
            os._exit(128 + number)

    def _is_copy(self, number: int, *, after: float) -> bool:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return after <= _SAME_REQUEST_SECONDS_TORCHRUN
        return after <= _SAME_REQUEST_SECONDS and number == self._received

    def _request(self, number: int) -> None:
        # Both the handler and the thread come here, in either order; the first one decides.
        if self._received is None:
            self._received = signal.Signals(number)

    def _restore(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be named.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]


_open_requests: list[StopRequest] = []


def stop_asked() -> bool:
    """Whether this rank was asked to stop. Others may not have been: whoever acts on it agrees with
    them first."""
    return any(request.received is not None for request in _open_requests)


def _forget_in_child() -> None:
    """A forked worker must not answer for its parent: it shares the wake-up socket."""
    for request in _open_requests:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        request._received = None
    _open_requests.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"emu35: {text}\n")
        sys.stderr.flush()
