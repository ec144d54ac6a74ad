"""``similarity``: how well pictures and words go together, by CLIP or SigLIP."""

from collections.abc import Sequence
from typing import Any

from emu35.config.reward_local import SimilarityRewardConfig
from emu35.errors import ConfigError
from emu35.rewards.image_text import ImageText
from emu35.rewards.sample import Range, Record, Sample, Score, Unscored

RANGES = {
    "clip": Range(low=0.0, high=0.4),
    "siglip": Range(low=-0.1, high=0.2),
    "siglip2": Range(low=-0.1, high=0.2),
}
"""Model type -> where its cosines of unrelated to fitting pairs may be expected. Published models
differ: compare them with the clamp rate of the log, and set ``low`` and ``high``."""


class SimilarityReward:
    """Cosine of a text and the answer's pictures (their mean, if several).

    The text is the record's ``caption`` where it has one (an edit's prompt describes a change, not
    a picture), or else the prompt. Models read its first 64 to 77 tokens.
    """

    def __init__(self, config: SimilarityRewardConfig) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, or the folder holds no such model.
        """
        self._model = ImageText(config)
        kind = self._model.model_type
        if kind not in RANGES:
            raise ConfigError(
                f"reward kind {config.kind!r}: {config.model} holds a model of type {kind!r}; "
                f"use one of {', '.join(RANGES)}"
            )
        self.range = RANGES[kind]
        self.cost = self._model.cost

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        scores: list[Score] = [Unscored("the answer has no picture to compare") for _ in samples]
        shown = [number for number, sample in enumerate(samples) if sample.pictures]
        if not shown:
            return scores
        texts_ND = self._model.texts([_text(samples[number]) for number in shown])
        pictures = [picture for number in shown for picture in samples[number].pictures]
        images_ND = self._model.images(pictures)
        first = 0
        for number, text_D in zip(shown, texts_ND, strict=True):
            last = first + len(samples[number].pictures)
            scores[number] = float((images_ND[first:last] @ text_D).mean())
            first = last
        return scores

    def problems(self, record: Record) -> list[str]:
        caption: Any = record.get("caption")
        if caption is not None and (not isinstance(caption, str) or not caption.strip()):
            return ["its caption must be words that describe the picture, or be left out"]
        return []


def _text(sample: Sample) -> str:
    caption: str | None = sample.record.get("caption")
    return sample.prompt if caption is None else caption
