"""Exponential moving average of the weights: what validation and the release use."""

import copy

import torch

from emu35.vision.ibq.model import IBQ


class AveragedIBQ:
    """An average of ``model``'s weights over training, as a model of its own.

    The decay grows from 0.1 towards ``decay`` as min(decay, (1 + n) / (10 + n)) after n updates:
    a short run would otherwise end on an average of mostly its random beginning.
    """

    def __init__(self, model: IBQ, *, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: IBQ) -> None:
        """Move the average towards ``model``'s present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight.detach(), 1.0 - decay)
        self.updates += 1
