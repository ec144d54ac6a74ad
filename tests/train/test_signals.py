"""Stop requests: noticed once, forwarded duplicates forgiven, forked workers left out of it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from emu35.train.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_sets_the_flag_and_is_named(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.received is None
        assert not stop.on_any_rank()
        os.kill(os.getpid(), number)
        assert stop.received is number
        assert stop.on_any_rank()


def test_duplicate_of_a_forwarded_signal_is_one_request() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.received is signal.SIGTERM


def test_previous_handlers_return() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopRequest():
        assert all(signal.getsignal(number) != before[number] for number in STOP_SIGNALS)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert not any(thread.name == "stop-signals" for thread in _lasting_threads())


def _lasting_threads() -> list[threading.Thread]:
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        if not any(thread.name == "stop-signals" for thread in threading.enumerate()):
            return []
        time.sleep(0.01)
    return threading.enumerate()


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen: list[bool] = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append(stop.on_any_rank())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_signal_to_a_forked_worker_ends_the_worker_and_does_not_stop_the_run() -> None:
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert stop.received is None


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_leaves_with_its_number(second: signal.Signals) -> None:
    program = (
        "import time\n"
        "from emu35.train.signals import StopRequest\n"
        "with StopRequest():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(second)
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + second
    assert "SIGTERM: saving" in told
    assert f"{second.name} again: leaving at once" in told
