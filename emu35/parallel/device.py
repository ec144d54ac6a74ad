"""Which device a rank has, what it can do at most, and how much of its memory this process has
used."""

import os
import resource
import sys
from types import MappingProxyType

import torch

PEAK_TFLOPS = MappingProxyType(
    {
        "A100": 312.0,
        "H100 NVL": 835.0,
        "H100 PCIe": 756.0,
        "H100": 989.0,
        "H200 NVL": 835.0,
        "H200": 989.0,
        "B200": 2250.0,
    }
)
"""Dense bf16 tensor-core TFLOPS by a part of the device's name, narrower names first. Nvidia's
data sheets print twice the number, with sparsity."""


def local_device() -> torch.device:
    """The CUDA device of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def known_peak_tflops(device: torch.device) -> float:
    """Dense bf16 TFLOPS of a GPU in the table; 0 for anything else."""
    if device.type != "cuda":
        return 0.0
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float:
    """The figure of the first entry of the table that occurs in ``name``, 0 if none does."""
    # GB200 is another chip with other clocks and must not pass as a B200.
    words = name.replace("-", " ").split()
    for part, peak in PEAK_TFLOPS.items():
        if all(word in words for word in part.split()):
            return peak
    return 0.0


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held: allocated tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
