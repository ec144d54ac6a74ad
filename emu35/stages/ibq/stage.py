"""Train the tokenizer as configured and write it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from emu35.config import RunConfig
from emu35.parallel.collectives import is_main
from emu35.parallel.mesh import init_mesh
from emu35.stages.ibq.task import IBQTask
from emu35.train.trainer import FitResult, fit
from emu35.vision.ibq.folder import write_folder

TOKENIZER_FOLDER = "vision_tokenizer"


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Train the tokenizer, or continue what ``run_dir`` holds; its averaged weights end in
    :data:`TOKENIZER_FOLDER` of the run folder.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    mesh = init_mesh(config.parallel, seed=config.seed, timeout=config.launch.timeout)
    with _no_denormals(mesh.device):
        task = IBQTask(config, run_dir=run_dir, device=mesh.device)
        try:
            result = fit(task, config=config, run_dir=run_dir)
            task.write_rejects()
        finally:
            task.close()
        if is_main():
            write_folder(task.average.model, folder=run_dir / TOKENIZER_FOLDER)
    return result


@contextmanager
def _no_denormals(device: torch.device) -> Iterator[None]:
    """On a CPU, compute with 0 in the place of denormal numbers: softmax tails over a large
    codebook are such, and many times slower. Whoever called computes as before."""
    if device.type != "cpu":
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
