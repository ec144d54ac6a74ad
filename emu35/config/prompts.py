"""What reinforcement learning reads: prompts by task, and how each task is rewarded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from emu35.config.check import at_least
from emu35.config.data import DataConfig


@dataclass(kw_only=True, slots=True)
class PromptTaskConfig:
    """A file of prompts, its share of every batch, and what its answers are worth.

    ``path`` is a JSONL file as ``emu35 generate --prompts-file`` takes it, with whatever the
    rewards need of each prompt. ``rewards`` gives the weight of each reward of ``stage.rewards``
    in the mean that is trained on; those of ``held_out`` are logged and never trained on.
    ``size`` (``"8x8"``, in codes, height first) fixes the grid of pictures, None leaves it to the
    record or the model. References are resized to ``image_area`` pixels (None: what their task
    recommends). ``max_new_tokens`` and ``steps`` (pictures) limit an answer. An answer of fewer
    than ``min_pictures`` pictures (None: 1 where the task draws) is not shown to any reward: it has
    the worst score of each, for a picture that never came must not go without consequence.
    """

    path: str
    ratio: float = 1.0
    task: str = "t2i"
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    held_out: list[str] = field(default_factory=list[str])
    size: str | None = None
    image_area: int | None = None
    max_new_tokens: int | None = None
    steps: int | None = None
    min_pictures: int | None = None

    def problems(self, where: str) -> Iterator[str]:
        """What is wrong with the task that the configuration calls ``where``."""
        if not 0 <= self.ratio < math.inf:
            yield f"{where}.ratio={self.ratio} must be a share: 0 or more"
        for name, weight in self.rewards.items():
            if not 0 < weight < math.inf:
                yield (
                    f"{where}.rewards.{name}={weight} must be positive; a reward that is only "
                    f"watched belongs into {where}.held_out"
                )
        for name in sorted(set(self.held_out) & self.rewards.keys()):
            yield f"{where}: reward {name} is trained on and held out at once; choose one"
        for name, value in (
            ("image_area", self.image_area),
            ("max_new_tokens", self.max_new_tokens),
            ("steps", self.steps),
        ):
            if value is not None and not value >= 1:
                yield f"{where}.{name}={value} is too small; use at least 1, or null"
        if self.min_pictures is not None and self.min_pictures < 0:
            yield f"{where}.min_pictures={self.min_pictures} must be 0 or more, or null"
        if self.steps is not None and (self.min_pictures or 0) > self.steps:
            yield (
                f"{where}.min_pictures={self.min_pictures} exceeds {where}.steps={self.steps}, "
                "behind which an answer ends; ask for fewer"
            )


@dataclass(kw_only=True, slots=True)
class PromptDataConfig(DataConfig):
    """Prompts, mixed by ``ratio`` within every batch; answers are packed into rows of
    ``sequence_length``. ``validation`` are prompts that are never trained on, by name."""

    kind: str = "prompts"
    sequence_length: int = 1024
    tasks: dict[str, PromptTaskConfig] = field(default_factory=dict[str, PromptTaskConfig])
    validation: dict[str, PromptTaskConfig] = field(default_factory=dict[str, PromptTaskConfig])

    def problems(self) -> Iterator[str]:
        yield from at_least("data", 1, sequence_length=self.sequence_length)
        for kind, tasks in (("tasks", self.tasks), ("validation", self.validation)):
            for name, task in tasks.items():
                yield from task.problems(f"data.{kind}.{name}")
        if self.tasks and not any(task.ratio > 0 for task in self.tasks.values()):
            yield "data.tasks: every ratio is 0; at least one task needs a positive one"
        for name, task in self.tasks.items():
            if task.ratio > 0 and not task.rewards:
                yield f"data.tasks.{name}.rewards is empty; name what its answers are judged by"
