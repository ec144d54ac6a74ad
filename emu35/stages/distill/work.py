"""Stretches in flight: requests out, answers in."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from emu35.inference.engine import Engine
from emu35.inference.request import Generated, Request
from emu35.stages.distill.judge import Judge, Sample
from emu35.stages.distill.prompts import Prompt, Stretch
from emu35.stages.generate.references import References

MOST_OPEN = 2
"""Stretches in flight at once: the next one fills the batch while the last answers of the one
before come in."""


@dataclass(kw_only=True, slots=True)
class _Asked:
    """A prompt in flight and those of its answers that are there, by sample."""

    prompt: Prompt
    codes: list[NDArray[np.integer]]
    answers: dict[int, Generated] = field(default_factory=dict[int, Generated])


@dataclass(kw_only=True, slots=True)
class _Open:
    """A stretch in flight and the samples of its prompts that are judged."""

    stretch: Stretch
    judged: dict[int, list[Sample]] = field(default_factory=dict[int, list[Sample]])

    @property
    def done(self) -> bool:
        return len(self.judged) == len(self.stretch.prompts)


class Work:
    """Feeds an engine with the requests of ``todo``, ``samples`` of every prompt, so that the batch
    stays full across prompts and stretches; :meth:`step` gives stretches back in their order.

    Args:
        make: builds the request of a prompt with references [H, W], for its sample 0.
        references: makes what reads the references of a stretch; they are forgotten with it.
        ahead: requests that wait in the engine beyond those that it runs.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        judge: Judge,
        todo: Sequence[Stretch],
        make: Callable[[Prompt, Sequence[NDArray[np.integer]]], Request],
        references: Callable[[], References],
        ahead: int,
    ) -> None:
        self._engine = engine
        self._judge = judge
        self._make = make
        self._references = references
        self._ahead = ahead
        self._samples = judge.options.samples
        self._todo = deque(todo)
        self._open: deque[_Open] = deque()
        self._owners: dict[int, tuple[_Open, _Asked, int]] = {}
        self._next: Iterator[tuple[_Open, _Asked, int, Request]] = iter(())

    def step(self) -> list[tuple[Stretch, list[Sample]]]:
        """One step of the engine; the stretches that it completed, samples in order.

        Raises:
            DataError: a reference changed since it was checked, or a reward failed.
        """
        self._feed()
        for update in self._engine.step():
            if update.finished is not None:
                self._take(update.finished)
        complete: list[tuple[Stretch, list[Sample]]] = []
        while self._open and self._open[0].done:
            head = self._open.popleft()
            ordered = [head.judged[prompt.number] for prompt in head.stretch.prompts]
            complete.append((head.stretch, [sample for samples in ordered for sample in samples]))
        return complete

    @property
    def busy(self) -> bool:
        """Whether anything is left."""
        return bool(self._todo or self._open)

    @property
    def judged(self) -> int:
        """Prompts of stretches in flight that are judged."""
        return sum(len(item.judged) for item in self._open)

    def _feed(self) -> None:
        while self._engine.stats.waiting < self._ahead:
            entry = next(self._next, None)
            if entry is not None:
                item, asked, sample, request = entry
                self._owners[self._engine.submit(request)] = (item, asked, sample)
            elif self._todo and len(self._open) < MOST_OPEN:
                self._open.append(_Open(stretch=self._todo.popleft()))
                self._next = self._of(self._open[-1])
            else:
                return

    def _of(self, item: _Open) -> Iterator[tuple[_Open, _Asked, int, Request]]:
        references = self._references()
        for prompt in item.stretch.prompts:
            codes = [reference.codes_HW for reference in references.of(prompt.wish)]
            asked = _Asked(prompt=prompt, codes=codes)
            request = self._make(prompt, codes)
            for sample in range(self._samples):
                yield item, asked, sample, replace(request, seed=prompt.seed(sample))

    def _take(self, answer: Generated) -> None:
        item, asked, sample = self._owners.pop(answer.index)
        asked.answers[sample] = answer
        if len(asked.answers) == self._samples:
            answers = [asked.answers[number] for number in range(self._samples)]
            item.judged[asked.prompt.number] = self._judge.judge(
                asked.prompt, answers=answers, references=asked.codes
            )
