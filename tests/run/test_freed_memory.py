"""Freed memory is kept: the pages of one step serve the next."""

import os
import subprocess
import sys

import pytest

from emu35.run.memory import SETTINGS

FAULTS = """
import resource
from emu35.run.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(2):
    block = b"x" * {size}
    del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = b"x" * {size}
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

SIZE = 40 << 20
"""More than glibc ever keeps by itself."""

PAGES = SIZE // os.sysconf("SC_PAGE_SIZE")


def faults(*, keep: bool, **environment: str) -> int:
    """Page faults of ten rounds in which :data:`SIZE` bytes are taken and freed."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep, size=SIZE)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_pages_serve_again() -> None:
    assert faults(keep=False) > 5 * PAGES
    assert faults(keep=True) < PAGES


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_variables_of_the_user_decide() -> None:
    asked = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    assert faults(keep=True, **asked) > 5 * PAGES
