"""What is lent belongs to one thread at a time, and comes back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from emu35.rewards.lend import Lender


def test_nothing_is_shared_and_no_more_is_made_than_threads_need() -> None:
    made: list[list[int]] = []
    together = threading.Barrier(3, timeout=10)

    def make() -> list[int]:
        made.append([])
        return made[-1]

    lender = Lender(make)
    assert made == []

    def use(turn: int) -> None:
        with lender.lend() as item:
            item.append(threading.get_ident())
            together.wait()
            assert item[-1] == threading.get_ident(), "another thread used it meanwhile"

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(use, range(30)))
    assert len(made) == 3
    assert sum(map(len, made)) == 30


def test_what_fails_comes_back_and_what_cannot_be_made_says_so() -> None:
    made: list[object] = []

    def make() -> object:
        if not made:
            made.append(object())
            return made[0]
        raise OSError("no more")

    lender = Lender(make)
    with pytest.raises(ValueError, match="the work"), lender.lend():
        raise ValueError("the work")
    with lender.lend() as again:
        assert again is made[0]
        with pytest.raises(OSError, match="no more"), lender.lend():
            pass
