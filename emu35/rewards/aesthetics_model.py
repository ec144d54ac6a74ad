"""``aesthetics_model``: a learnt judgement of looks, from CLIP features and a linear head."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.functional import linear

from emu35.config.reward_local import AestheticsModelRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.image_text import ImageText
from emu35.rewards.sample import Picture, Range, Record, Sample, Score, Unscored
from emu35.vision.weights import read_weights


class AestheticsModelReward:
    """Mean over the answer's pictures of what linear layers make of their unit CLIP features.

    The head is LAION's aesthetic predictor in either form: one layer (``weight``, ``bias``), or
    several (``layers.0.weight`` ...) with nothing between them but dropout. It learnt from people's
    scores of 1 to 10.
    """

    range = Range(low=1.0, high=10.0)

    def __init__(self, config: AestheticsModelRewardConfig) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, the model's folder lacks a file, or the
                head's file does not hold linear layers that fit each other.
        """
        self._model = ImageText(config)
        self.cost = self._model.cost
        path = Path(config.head)
        owner = f"reward kind {config.kind!r}"
        weights = read_weights(path, owner=owner)
        self._head = linear_layers(weights, where=f"{owner}: {path}")

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        scores: list[Score] = [Unscored("the answer has no picture to look at") for _ in samples]
        pictures = [picture for sample in samples for picture in sample.pictures]
        if not pictures:
            return scores
        judged_N = self.judge(pictures)
        first = 0
        for number, sample in enumerate(samples):
            last = first + len(sample.pictures)
            if sample.pictures:
                scores[number] = float(judged_N[first:last].mean())
            first = last
        return scores

    def judge(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """fp32 [N], one number for each of N pictures (at least one)."""
        return self._judge(self._model.images(pictures))

    def problems(self, record: Record) -> list[str]:
        """None: it looks at pictures only."""
        return []

    def _judge(self, features_ND: torch.Tensor) -> torch.Tensor:
        wanted = self._head[0][0].shape[1]
        if features_ND.shape[1] != wanted:
            raise ConfigError(
                f"the head of reward kind 'aesthetics_model' takes {wanted} features, but its "
                f"model gives {features_ND.shape[1]}; give the model that the head was made for"
            )
        for weight, bias in self._head:
            features_ND = linear(features_ND, weight, bias)
        return features_ND[:, 0]


def linear_layers(
    weights: Mapping[str, torch.Tensor], *, where: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight [O, I] and bias [O] of each layer, in the order of the numbers in their names; the
    last has one output.

    Raises:
        ConfigError: the tensors are something else; ``where`` is how the message begins.
    """
    numbers: dict[str, int] = {}
    for name in weights:
        stem, _, last = name.rpartition(".")
        digits = re.findall(r"\d+", stem)
        if last in ("weight", "bias"):
            numbers[stem] = int(digits[-1]) if digits else 0
    stems = sorted(numbers, key=numbers.__getitem__)
    names = [".".join(filter(None, (stem, end))) for stem in stems for end in ("weight", "bias")]
    if not names or sorted(names) != sorted(weights):
        raise ConfigError(
            f"{where} has {', '.join(sorted(weights)) or 'nothing'}; a head has a weight and a "
            "bias for each linear layer and nothing else"
        )
    layers = [(weights[a], weights[b]) for a, b in zip(names[::2], names[1::2], strict=True)]
    sizes: list[int] = []
    for weight, bias in layers:
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or (sizes and weight.shape[1] != sizes[-1]):
            raise ConfigError(
                f"{where} has layers of {[tuple(weight.shape) for weight, _ in layers]}, which do "
                "not follow each other"
            )
        sizes.append(weight.shape[0])
    if sizes[-1] != 1:
        raise ConfigError(f"{where} ends with {sizes[-1]} outputs; a head ends with one number")
    return layers
