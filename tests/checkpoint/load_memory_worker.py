"""How much memory loading takes; run alone or under torchrun.

Usage: load_memory_worker.py RELEASE... -- every release is loaded in fp32 and in bf16, in as many
tensor-parallel ranks as there are; every rank prints a line of JSON each, with the largest growth
of its anonymous memory over the bytes of its parameters.
"""

import ctypes
import gc
import json
import os
import re
import sys
import threading
from pathlib import Path

from emu35.checkpoint.source import describe, load_model
from emu35.config import ParallelConfig, Precision
from emu35.parallel.mesh import inference_mesh, leave


class Peak:
    """Watches this process's anonymous memory: pages of mapped files are the system's to take."""

    def __enter__(self) -> "Peak":
        self.start = self.most = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self.most = max(self.most, anonymous_bytes())


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    tp = int(os.environ.get("WORLD_SIZE", "1"))
    inference_mesh(tp=tp)
    for folder in map(Path, sys.argv[1:]):
        for precision in Precision:
            described = describe(folder)
            with Peak() as peak:
                model = load_model(described, precision=precision, parallel=ParallelConfig(tp=tp))
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            line = {
                "stored": described.precision.value,
                "loaded": precision.value,
                "bytes": size,
                "growth": (peak.most - peak.start) / size,
            }
            print(json.dumps(line), flush=True)
            del model
            # Or the next load would find its memory in this process.
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
    leave()


if __name__ == "__main__":
    main()
