"""Answers to rewards, while others are still being sampled.

An answer that has ended is decoded by a thread of its own and handed to the pool of rewards; the
engine goes on meanwhile. What is left to wait for when the last answer has ended is the part of
scoring that sampling could not hide.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu35.config.prompts import PromptTaskConfig
from emu35.config.reward import RewardConfig
from emu35.inference.request import Generated
from emu35.rewards.build import build_rewards
from emu35.rewards.pool import RewardPool, Ticket
from emu35.rewards.sample import Picture, Sample
from emu35.rewards.scale import Scores, combine, worst
from emu35.stages.grpo.types import Prompt
from emu35.tokens.answer import read_answer
from emu35.tokens.template import TASKS, Task
from emu35.vision.codec import ImageCodec, decode_grids
from emu35.vision.resize import to_image

BEAT_SECONDS = 5.0
"""Between two signs of life of somebody who waits for a score."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """An answer's scores, and its pictures as the rewards saw them."""

    scores: Scores
    sample: Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """An answer that is being judged."""

    task: PromptTaskConfig
    sent: "Future[tuple[Sample, Ticket | None]]"


class Scoring:
    """The rewards of a run, and the thread that decodes for them.

    Args:
        codec: of the codes of pictures.
        rewards: all that tasks may name.

    Attributes:
        pool: of the rewards; its counts say how much of its time was waited for.
    """

    def __init__(self, *, codec: ImageCodec, rewards: Mapping[str, RewardConfig]) -> None:
        built = build_rewards(rewards)
        self._codec = codec
        self.pool = RewardPool(built, configs=rewards)
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")

    def submit(self, prompt: Prompt, answer: Generated, *, task: PromptTaskConfig) -> Pending:
        """Have an answer judged by the rewards of its task, those held out among them."""
        sent = self._decoder.submit(self._send, prompt, answer, task)
        return Pending(task=task, sent=sent)

    def result(self, pending: Pending, *, beat: Callable[[], None]) -> Judged:
        """The scores of an answer, waiting for them; ``beat`` is called meanwhile, as a sign of
        life."""
        if not pending.sent.done():
            with self.pool.waiting():
                pending.sent.exception()  # waits
        sample, ticket = pending.sent.result()
        ranges, weights = self.pool.ranges, pending.task.rewards
        if ticket is None:
            scores = worst(_judges(pending.task), ranges=ranges, weights=weights)
            return Judged(scores=scores, sample=sample)
        while not ticket.done:
            beat()
            with suppress(TimeoutError):
                ticket.result(timeout=BEAT_SECONDS)
        scores = combine(ticket.result(), ranges=ranges, weights=weights)
        return Judged(scores=scores, sample=sample)

    def close(self) -> None:
        """End the threads; what is in flight is given up."""
        self._decoder.shutdown(wait=True, cancel_futures=True)
        self.pool.close()

    def _send(
        self, prompt: Prompt, answer: Generated, task: PromptTaskConfig
    ) -> tuple[Sample, Ticket | None]:
        sample = self.sample_of(prompt, answer, task=prompt.record.get("task") or task.task)
        if len(sample.pictures) < _least_pictures(task, asked=sample.task):
            return sample, None
        return sample, self.pool.submit(sample, rewards=_judges(task))

    def sample_of(self, prompt: Prompt, answer: Generated, *, task: str) -> Sample:
        """An answer as rewards see it."""
        pictures = self._pictures([*answer.document.images, *prompt.references])
        count = len(answer.document.images)
        return Sample(
            record=prompt.record,
            task=task,
            prompt=str(prompt.record.get("prompt", "")),
            texts=_texts(answer, pictures=count),
            pictures=pictures[:count],
            references=pictures[count:],
            where=f"an answer to {prompt.id}",
        )

    def _pictures(self, grids: Sequence[NDArray[np.integer]]) -> list[Picture]:
        return [np.asarray(to_image(pixels)) for pixels in decode_grids(self._codec, grids)]


def _judges(task: PromptTaskConfig) -> list[str]:
    return [*task.rewards, *task.held_out]


def _least_pictures(task: PromptTaskConfig, *, asked: str) -> int:
    if task.min_pictures is not None:
        return task.min_pictures
    return int(TASKS[Task(asked)].images)


def _texts(answer: Generated, *, pictures: int) -> list[str]:
    """The text before each picture and the one behind the last."""
    texts = read_answer(answer.document).captions[: pictures + 1]
    # Pictures behind the end of an answer have no text.
    return texts + [""] * (pictures + 1 - len(texts))
