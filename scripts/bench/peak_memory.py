"""The highest memory that something needs above what was there before it, exactly.

On a GPU the allocator keeps count; on a CPU Linux does, for the resident memory of the process.
"""

import re
from pathlib import Path

import torch


class Peak:
    """The highest memory since this object was made, above what was held then."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        try:
            # Linux forgets the highest resident memory so far (man proc, clear_refs).
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            raise SystemExit(f"memory is measured through Linux' /proc: {error}") from error
        self.start = _resident("VmRSS")

    def above_start(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")
        return peak - self.start


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
