"""Answers to documents: which are whole, what they are worth, which are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu35.inference.request import Finish, Generated
from emu35.rewards.named import NamedReward
from emu35.rewards.sample import Sample as Shown
from emu35.rewards.sample import Score, Unscored
from emu35.stages.distill.options import DistillOptions
from emu35.stages.distill.prompts import Prompt
from emu35.tokens.answer import ESS, read_answer
from emu35.tokens.document import Document, Image, Part, Special
from emu35.tokens.serialize import TokenSequence, serialize, split_parts
from emu35.tokens.template import answer_ids, question_parts
from emu35.tokens.text import TextTokenizer
from emu35.vision.codec import ImageCodec, decode_grids
from emu35.vision.resize import to_image


class Drop(StrEnum):
    """Why a sample was not kept, as counted in the summary. The first four are incomplete answers:
    no reward sees them."""

    cut_off = "incomplete: no end within max_new_tokens"
    no_picture = "incomplete: no picture"
    broken = "incomplete: not in the form of an answer"
    bad_text = "incomplete: text that is not UTF-8"
    too_long = "longer than the sequence length"
    unscored = "the reward could not judge it"
    below = "reward below the least"
    not_best = "reward not among the best"


_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An answer and what became of it; ``texts`` is what it says before each picture and behind the
    last, ``sequence`` its document, where it has the form of one, ``drop`` None where it is kept.
    """

    id: str
    prompt: int
    number: int
    seed: int
    finish: Finish
    pictures: list[NDArray[np.integer]]
    texts: list[str]
    sequence: TokenSequence | None
    reward: float | None = None
    drop: Drop | None = None
    detail: str = ""

    def row(self) -> dict[str, Any]:
        """The line of ``samples.jsonl``."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "sample": self.number,
            "seed": self.seed,
            "finish": self.finish.value,
            "pictures": len(self.pictures),
            "tokens": len(self.sequence) if self.sequence is not None else None,
            "reward": self.reward,
            "kept": self.drop is None,
            "why": self.drop.value if self.drop else None,
            "detail": self.detail,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """Judges the answers to one prompt together."""

    options: DistillOptions
    tokenizer: TextTokenizer
    codec: ImageCodec
    reward: NamedReward | None

    def judge(
        self,
        prompt: Prompt,
        *,
        answers: Sequence[Generated],
        references: Sequence[NDArray[np.integer]],
    ) -> list[Sample]:
        """The samples of ``prompt``, whose references are codes [H, W], in order of ``answers``.

        Raises:
            DataError: the reward failed.
        """
        samples = [
            self._sample(prompt, number=number, answer=answer, references=references)
            for number, answer in enumerate(answers)
        ]
        if self.reward is not None:
            samples = self._scored(
                samples, prompt=prompt, references=references, reward=self.reward
            )
        samples = [self._least(sample) for sample in samples]
        return self._best(samples)

    def _sample(
        self,
        prompt: Prompt,
        *,
        number: int,
        answer: Generated,
        references: Sequence[NDArray[np.integer]],
    ) -> Sample:
        drop, detail = _incomplete(answer)
        sequence = None
        sample_id = f"{prompt.id}#{number}"
        if drop is None:
            document = Document(
                document_parts(
                    prompt, answer=answer, references=references, tokenizer=self.tokenizer
                ),
                source=self.options.source,
                id=sample_id,
            )
            sequence = serialize(document, self.tokenizer)
            most = self.options.sequence_length
            if 0 < most < len(sequence):
                drop, detail = Drop.too_long, f"{len(sequence)} tokens, above {most}"
        return Sample(
            id=sample_id,
            prompt=prompt.number,
            number=number,
            seed=prompt.seed(number),
            finish=answer.finish,
            pictures=answer.document.images,
            texts=read_answer(answer.document).captions,
            sequence=sequence,
            drop=drop,
            detail=detail,
        )

    def _scored(
        self,
        samples: Sequence[Sample],
        *,
        prompt: Prompt,
        references: Sequence[NDArray[np.integer]],
        reward: NamedReward,
    ) -> list[Sample]:
        """The rewards of all that are whole, long or not."""
        whole = [sample for sample in samples if sample.sequence is not None]
        grids = [*references, *(codes_HW for sample in whole for codes_HW in sample.pictures)]
        decoded = decode_grids(self.codec, grids) if whole else []
        pictures = iter([np.asarray(to_image(pixels_3HW)) for pixels_3HW in decoded])
        seen = list(islice(pictures, len(references)))
        scored: dict[int, Sample] = {}
        for sample in whole:
            shown = Shown(
                record=prompt.record,
                task=prompt.wish.task.value,
                prompt=prompt.wish.prompt,
                texts=sample.texts,
                pictures=list(islice(pictures, len(sample.pictures))),
                references=seen,
                where=f"sample {sample.number} of {prompt.wish.where}",
            )
            scored[sample.number] = _with_score(sample, score=reward.score(shown))
        return [scored.get(sample.number, sample) for sample in samples]

    def _least(self, sample: Sample) -> Sample:
        least = self.options.min_reward
        if sample.drop is not None or least is None or sample.reward is None:
            return sample
        if sample.reward >= least:
            return sample
        return replace(sample, drop=Drop.below, detail=f"{sample.reward:g} < {least:g}")

    def _best(self, samples: list[Sample]) -> list[Sample]:
        """All but the best lose their place; of equal ones the earlier is better."""
        if self.options.keep_best is None:
            return samples
        left = [sample for sample in samples if sample.drop is None]
        left.sort(key=lambda sample: (-(sample.reward or 0.0), sample.number))
        worse = {sample.number for sample in left[self.options.keep_best :]}
        return [
            replace(sample, drop=Drop.not_best) if sample.number in worse else sample
            for sample in samples
        ]


def _with_score(sample: Sample, *, score: Score) -> Sample:
    if isinstance(score, Unscored):
        return replace(sample, drop=sample.drop or Drop.unscored, detail=score.reason)
    return replace(sample, reward=score)


def _incomplete(answer: Generated) -> tuple[Drop | None, str]:
    """What an answer lacks to be taught, with a detail; None where it is whole."""
    found = read_answer(answer.document)
    if answer.finish in (Finish.length, Finish.abort):
        pictures = len(answer.document.images)
        return Drop.cut_off, f"{len(answer.tokens)} tokens, {pictures} pictures"
    if found.problems:
        return Drop.broken, "; ".join(found.problems)
    if not found.images:
        return Drop.no_picture, f"{len(answer.tokens)} tokens"
    if any(_UNREADABLE in text for text in answer.document.texts):
        return Drop.bad_text, ""
    return None, ""


def document_parts(
    prompt: Prompt,
    *,
    answer: Generated,
    references: Sequence[NDArray[np.integer]],
    tokenizer: TextTokenizer,
) -> list[Part]:
    """The question in the form of its task and the answer as generated, ended as in training.

    The form is that of fine-tuning whatever the form of the prompt was that the model was asked in.
    """
    images = [Image(codes_HW) for codes_HW in references]
    ids = answer_ids(answer.ids, vocabulary=tokenizer.vocabulary)
    asked = question_parts(prompt.wish.task, prompt.wish.prompt, images=images)
    return [*asked, *split_parts(ids, tokenizer), Special(ESS)]
