"""``ocr``: how truly a picture renders the words that it was asked for."""

from collections.abc import Sequence
from typing import Any

from emu35.config.reward_local import OcrRewardConfig
from emu35.rewards.reader import Reader
from emu35.rewards.sample import Cost, Range, Record, Sample, Score, Unscored
from emu35.rewards.text_fidelity import Normal, fidelity


class OcrReward:
    """Fidelity of the record's ``text`` (a string, or a list of strings that may stand anywhere in
    the picture) to what is read off the answer's pictures, in [0, 1]
    (:func:`emu35.rewards.text_fidelity.fidelity`).

    Words beyond those asked for cost as much as words that are missing. Several pictures are read
    one after the other.
    """

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: OcrRewardConfig) -> None:
        """
        Raises:
            ConfigError: what reads is not installed, or its models are not there.
        """
        self._reader = Reader(config)
        self._normal = Normal(ignore_case=config.ignore_case, ignore_spaces=config.ignore_spaces)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        text: Any = record.get("text")
        if text is None:
            return ["reward kind 'ocr' needs the words to be rendered under text; add them"]
        texts: list[Any] = text if isinstance(text, list) else [text]
        if not all(isinstance(item, str) for item in texts):
            return ["its text must be a string or a list of strings"]
        if not texts or not all(self._normal(item) for item in texts):
            return ["its text has nothing to read; write the words that pictures are to show"]
        return []

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to read")
        text: str | list[str] = sample.record["text"]
        wanted = [text] if isinstance(text, str) else text
        found = [line.text for picture in sample.pictures for line in self._reader.lines(picture)]
        return fidelity(wanted, found, normal=self._normal)
