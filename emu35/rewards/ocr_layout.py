"""``ocr_layout``: whether texts stand where they were asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from emu35.config.reward_local import OcrLayoutRewardConfig
from emu35.rewards.boxes import Box, around, box_problem, overlap, shared
from emu35.rewards.reader import Line, Reader
from emu35.rewards.sample import Cost, Range, Record, Sample, Score, Unscored
from emu35.rewards.text_fidelity import Normal, likeness


class OcrLayoutReward:
    """Likeness of text times overlap of boxes, averaged over the items of the record's ``layout``
    (``[{"text": "OPEN", "box": [x0, y0, x1, y1]}, ...]``, shares of width and height) and over the
    lines that belong to none of them, in [0, 1].

    Every line that is read belongs to the item whose box covers most of it; lines of one item are
    one text, in reading order, within one box around them. The answer's first picture is read.
    """

    range = Range(low=0.0, high=1.0)
    cost = Cost.cpu

    def __init__(self, config: OcrLayoutRewardConfig) -> None:
        """
        Raises:
            ConfigError: what reads is not installed, or its models are not there.
        """
        self._reader = Reader(config)
        self._normal = Normal(ignore_case=config.ignore_case, ignore_spaces=config.ignore_spaces)
        self._good = config.good_overlap

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        layout: Any = record.get("layout")
        if not isinstance(layout, list) or not layout:
            return [
                "reward kind 'ocr_layout' needs layout, a list of "
                '{"text": ..., "box": [x0, y0, x1, y1]}; add it'
            ]
        return [
            f"item {number} of its layout {problem}"
            for number, item in enumerate(layout, start=1)
            if (problem := self._item_problem(item))
        ]

    def _item_problem(self, item: Any) -> str | None:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            return "has no text; write the words that stand there"
        if not self._normal(item["text"]):
            return "has nothing to read; write the words that stand there"
        problem = box_problem(item.get("box"))
        return f"has a box that {problem}" if problem else None

    def _score(self, sample: Sample) -> Score:
        if not sample.pictures:
            return Unscored("the answer has no picture to read")
        items: Sequence[Mapping[str, Any]] = sample.record["layout"]
        boxes: list[Box] = [tuple(item["box"]) for item in items]
        groups: list[list[Line]] = [[] for _ in items]
        spare = 0
        for line in self._reader.lines(sample.pictures[0]):
            covered = [shared(line.box, box) for box in boxes]
            if max(covered) > 0:
                groups[covered.index(max(covered))].append(line)
            else:
                spare += 1
        right = sum(
            self._worth(item["text"], box, lines)
            for item, box, lines in zip(items, boxes, groups, strict=True)
            if lines
        )
        return right / (len(items) + spare)

    def _worth(self, text: str, box: Box, lines: Sequence[Line]) -> float:
        between = "" if self._normal.ignore_spaces else " "
        read = self._normal(between.join(line.text for line in lines))
        placed = min(1.0, overlap(box, around(line.box for line in lines)) / self._good)
        return likeness(self._normal(text), read) * placed
