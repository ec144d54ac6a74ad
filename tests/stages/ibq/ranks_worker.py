"""Runs of the tokenizer stage, one after another, on the ranks that torchrun starts.

The argument is a JSON file of jobs: ``config`` (a file), ``run_dir``, and perhaps ``refuse_after``,
the last step that the guard accepts.
"""

import json
import sys
from pathlib import Path

import torch

from emu35.config.io import read_config
from emu35.parallel import mesh
from emu35.stages.ibq import stage
from emu35.stages.ibq.task import IBQTask

torch.set_num_threads(1)
accepts = IBQTask._accepts

for job in json.loads(Path(sys.argv[1]).read_text()):
    last = job.get("refuse_after", 1_000_000)

    def judged(self, losses, *, norms, last=last):
        if self.clock.step > last:
            self.guard.refuse("the test wants it")
            return False
        return accepts(self, losses, norms=norms)

    IBQTask._accepts = judged
    stage.run(read_config(Path(job["config"])), run_dir=Path(job["run_dir"]))
mesh.leave()
