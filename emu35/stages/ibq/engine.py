"""From losses to updated weights: gradients of the global batch, their norm, one step of Adam.

A step is any number of ``backward``, one ``reduce``, and then ``step`` or ``discard``. The guard
decides between them, for the generator and the discriminator at once, so nothing may change before.
:class:`PlainEngine` is torch alone, with whole copies on every rank; :mod:`.zero` splits optimizer
state over the ranks and is tested against it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from emu35.config import OptimConfig
from emu35.parallel.collectives import world_size
from emu35.stages.ibq.over_ranks import average_over_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of every weight, by torch's names."""

BUCKET_ELEMENTS = 1 << 24
"""Gradient elements reduced over the ranks at once (64 MiB)."""


@dataclass(kw_only=True, slots=True)
class Moments:
    """Adam's state of one weight: how many updates it has seen, and the whole fp32 averages."""

    updates: int
    averages: dict[str, torch.Tensor]


class Engine(Protocol):
    """One network and its optimizer. Every method is called on every rank."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of ``loss``, this rank's share of a mean over micro-batches."""
        ...

    def reduce(self) -> float:
        """Average what ``backward`` has added over the ranks; the L2 norm of the result before
        clipping, the same on every rank. Not finite where a gradient is not."""
        ...

    def step(self, *, lr: float) -> None:
        """Clip and update. Only after ``reduce`` gave a finite norm."""
        ...

    def discard(self) -> None:
        """Forget the gradients instead of :meth:`step`."""
        ...

    def adopt(self) -> None:
        """Take over weights that somebody else has changed in place, alike on all ranks."""
        ...

    def forget(self, name: str) -> None:
        """Start the moments of one parameter group anew."""
        ...

    def moments(self) -> dict[str, Moments]:
        """Adam's state by the names of the weights; whole on the main rank, empty on others."""
        ...

    def load_moments(self, moments: Mapping[str, Moments]) -> None:
        """Restore what :meth:`moments` gave, with any number of ranks."""
        ...


@dataclass(kw_only=True, slots=True)
class Group:
    """Weights that share their settings and start together."""

    name: str
    weights: dict[str, nn.Parameter]
    weight_decay: float


CODEBOOK = "codebook"


def groups_of(network: nn.Module, *, weight_decay: float) -> list[Group]:
    """Weight decay on matrices and convolutions only: never biases, norms or the codebook. The
    codebook is a group of its own, because it may start later than everything else."""
    parts = dict[str, dict[str, nn.Parameter]](decayed={}, plain={}, codebook={})
    for name, weight in network.named_parameters():
        if "quantize." in name:
            parts[CODEBOOK][name] = weight
        else:
            parts["decayed" if weight.ndim > 1 else "plain"][name] = weight
    return [
        Group(name=name, weights=weights, weight_decay=weight_decay if name == "decayed" else 0.0)
        for name, weights in parts.items()
        if weights
    ]


def adam(groups: list[Group], *, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over ``groups``; without weight decay that is Adam."""
    first, second = config.betas
    return torch.optim.AdamW(
        [
            {"params": list(group.weights.values()), "weight_decay": group.weight_decay}
            for group in groups
        ],
        lr=config.lr,
        betas=(first, second),
        eps=config.eps,
        fused=True,
    )


class PlainEngine:
    """torch's AdamW on a whole copy of everything; gradients are averaged over the ranks."""

    def __init__(self, network: nn.Module, *, config: OptimConfig) -> None:
        self._groups = groups_of(network, weight_decay=config.weight_decay)
        self._weights = dict(network.named_parameters())
        self._optimizer = adam(self._groups, config=config)
        self._limit = config.clip_grad or math.inf
        self._norm = torch.zeros(())

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def reduce(self) -> float:
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        if world_size() > 1:
            average_over_ranks(gradients, bucket_elements=BUCKET_ELEMENTS)
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return float(self._norm)

    def step(self, *, lr: float) -> None:
        trained = [weight for weight in self._weights.values() if weight.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(trained, self._limit, self._norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def adopt(self) -> None:
        """The weights are the only copy."""

    def forget(self, name: str) -> None:
        for group in self._groups:
            if group.name == name:
                for weight in group.weights.values():
                    self._optimizer.state.pop(weight, None)

    def moments(self) -> dict[str, Moments]:
        return {
            name: Moments(
                updates=int(self._optimizer.state[weight]["step"].item()),
                averages={key: self._optimizer.state[weight][key] for key in MOMENTS},
            )
            for name, weight in self._weights.items()
            if weight in self._optimizer.state
        }

    def load_moments(self, moments: Mapping[str, Moments]) -> None:
        self._optimizer.state.clear()
        for name, found in moments.items():
            weight = self._weights[name]
            # A fused step counts on a GPU where it computes there, and walks over weights and
            # moments side by side, so both must lie in memory alike.
            counter = torch.tensor(float(found.updates), device=weight.device)
            self._optimizer.state[weight] = {
                "step": counter,
                **{
                    key: torch.empty_like(weight, requires_grad=False).copy_(average)
                    for key, average in found.averages.items()
                },
            }


def build_engine(
    network: nn.Module, *, config: OptimConfig, zero1: bool, device: torch.device
) -> Engine:
    """What trains ``network``: ZeRO-1 where it is asked for and there is something to split.

    Raises:
        ConfigError: DeepSpeed is needed and cannot be used.
    """
    if zero1 and world_size() > 1:
        from emu35.stages.ibq.zero import ZeroEngine

        return ZeroEngine(network, config=config, device=device)
    return PlainEngine(network, config=config)
