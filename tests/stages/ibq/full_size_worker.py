"""One step of the full-size tokenizer on 64 pixels: parameters, metrics and peak memory as JSON.

The arguments are a folder of pictures and a run folder.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from emu35.run.compose import compose
from emu35.stages.ibq.task import IBQTask

config = compose(
    [
        "experiment=ibq/455m",
        f"data.paths=[{sys.argv[1]}]",
        "data.validation_paths=[]",
        "data.resolution=64",
        "stage.global_batch_size=1",
        "stage.micro_batch_size=1",
        "stage.perceptual.kind=random_features",
        "stage.perceptual.weights=null",
        "stage.distillation.kind=random_features",
        "stage.distillation.teacher=null",
        "stage.adversarial.start_step=0",
        "optim.warmup_steps=1",
        "launch=local",
        "launch.nproc=1",
        "launch.nodes=1",
    ]
)
torch.set_flush_denormal(True)
task = IBQTask(config, run_dir=Path(sys.argv[2]), device=torch.device("cpu"))
before = task.model.quantize.codebook_KD.clone()
numbers = task.train_step(1)
task.close()
print(
    json.dumps(
        {
            "parameters": sum(weight.numel() for weight in task.model.parameters()),
            "moved": int((task.model.quantize.codebook_KD != before).any(dim=1).sum()),
            "numbers": numbers,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
