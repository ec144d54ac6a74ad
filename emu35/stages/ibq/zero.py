"""The engine of several ranks: DeepSpeed ZeRO-1 (arXiv 1910.02054; paper section 5.2).

Every rank holds all weights, but moments and updates of its share alone: at 455 million parameters
over 8 ranks that is 0.5 GB instead of 3.6 GB of moments. DeepSpeed drives torch's AdamW over flat
pieces of the parameter groups; networks are called directly, never through its engine, so autocast
and the fp32 quantizer are the same as without it.

Where DeepSpeed has no call for what is needed here, its own behaviour is used instead of its
insides. It has none to drop gradients, but drops a step whose gradient is not finite: so
:meth:`ZeroEngine.discard` makes it one. It shows moments only after the first step: so one is made
with zero gradients and a rate of zero, which leaves every weight as it is.
"""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from emu35.config import OptimConfig
from emu35.errors import ConfigError
from emu35.parallel.collectives import is_main
from emu35.stages.ibq.engine import BUCKET_ELEMENTS, MOMENTS, Moments, adam, groups_of


class ZeroEngine:
    """An :class:`~emu35.stages.ibq.engine.Engine` over all ranks of the process group."""

    def __init__(self, network: nn.Module, *, config: OptimConfig, device: torch.device) -> None:
        """
        Raises:
            ConfigError: DeepSpeed cannot be imported.
        """
        self._deepspeed = _import_deepspeed(device)
        self._groups = groups_of(network, weight_decay=config.weight_decay)
        self._weights = dict(network.named_parameters())
        self._optimizer = adam(self._groups, config=config)
        self._engine, *_ = self._deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            dist_init_required=False,
            config={
                # Micro-batches are counted, and the loss divided, by the task.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.clip_grad,
                "zero_optimization": {
                    "stage": 1,
                    "reduce_bucket_size": BUCKET_ELEMENTS,
                    "allgather_bucket_size": BUCKET_ELEMENTS,
                },
                "steps_per_print": None,
            },
        )
        self._step_without_effect()

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(loss)

    def reduce(self) -> float:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        return float(self._engine.optimizer.scaled_global_norm())

    def step(self, *, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        weight = next(iter(self._weights.values()))
        self.backward(weight.sum() * math.nan)
        self.reduce()
        self._engine.step()

    def adopt(self) -> None:
        self._engine.optimizer.refresh_fp32_params()

    def forget(self, name: str) -> None:
        for group, state in zip(self._groups, self._states(), strict=True):
            if group.name == name:
                _clear(state)

    def moments(self) -> dict[str, Moments]:
        found = dict[str, Moments]()
        for group, state in zip(self._groups, self._states(), strict=True):
            updates = int(state["step"].item())
            for name, weight in group.weights.items():
                # Every rank takes part; only one keeps what they put together.
                whole = {key: self._whole(weight, key=key) for key in MOMENTS}
                if is_main():
                    found[name] = Moments(updates=updates, averages=whole)
        return found

    def load_moments(self, moments: Mapping[str, Moments]) -> None:
        for group, state in zip(self._groups, self._states(), strict=True):
            _clear(state)
            for name, weight in group.weights.items():
                if name not in moments:
                    continue
                state["step"].fill_(max(float(state["step"]), moments[name].updates))
                for key, average in moments[name].averages.items():
                    self._deepspeed.utils.safe_set_full_optimizer_state(
                        weight, average.to(weight.device).contiguous(), key
                    )

    def _states(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of this rank's piece of every group."""
        return [
            self._optimizer.state[piece]
            for group in self._optimizer.param_groups
            for piece in group["params"]
        ]

    def _whole(self, weight: nn.Parameter, *, key: str) -> torch.Tensor:
        return self._deepspeed.utils.safe_get_full_optimizer_state(weight, key).cpu()

    def _step_without_effect(self) -> None:
        """Bring the moments into being, all zero. Those of all groups must be there before the
        first step: DeepSpeed looks for them in the middle of it."""
        for group in self._optimizer.param_groups:
            for piece in group["params"]:
                on = piece.device if piece.is_cuda else torch.device("cpu")
                self._optimizer.state[piece] = {
                    "step": torch.zeros((), dtype=torch.float32, device=on),
                    **{key: torch.zeros_like(piece) for key in MOMENTS},
                }
        self.backward(torch.stack([weight.sum() * 0.0 for weight in self._weights.values()]).sum())
        self.reduce()
        self.step(lr=0.0)
        for state in self._states():
            _clear(state)


def _clear(state: dict[str, torch.Tensor]) -> None:
    """As before the first update, in place: DeepSpeed holds views of these tensors."""
    for tensor in state.values():
        tensor.zero_()


def _import_deepspeed(device: torch.device) -> Any:
    # Asked for by name, it looks for no other accelerator, and says nothing about it.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
        import deepspeed.utils
    except ImportError as error:
        raise ConfigError(
            f"parallel.zero1=true needs DeepSpeed, which cannot be imported ({error}); "
            "pip install 'emu35[tokenizer]', or set parallel.zero1=false for whole copies"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Its collectives over shared memory are compiled at the first use, which takes a compiler
        # and a minute; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
