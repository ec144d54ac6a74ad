"""What a process takes up when it starts: megatron-core, and nothing that nobody asked for."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

IMPORTS = """
import json, sys
{before}
from emu35.parallel import cpu
cpu.install()
import torch
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
taken = [name for name in ("wandb", "torch._inductor.compile_fx") if name in sys.modules]
import wandb
two = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()
print(json.dumps({{"taken": taken, "wandb": wandb.__version__, "two": two}}))
"""


def started(before: str = "") -> dict[str, Any]:
    """What a new process says that takes up megatron-core after ``before``."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(before=before)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the fused functions are compiled")
def test_neither_wandb_nor_the_compiler_is_imported_and_both_work_when_asked_for() -> None:
    told = started()
    assert told["taken"] == []
    assert told["wandb"]
    assert told["two"] == 2


def test_what_was_imported_before_stays() -> None:
    assert "wandb" in started("import wandb")["taken"]
