"""``judge`` and ``consistency``: a vision language model behind an OpenAI-compatible address.

A judge is asked for one number in one form, and its reply is that or it is a failed call: no number
is fished out of prose, and one beyond the scale is not clamped, for a judge that answers 700 of 10
did not understand the question. Judges that think aloud need a server that keeps their thoughts
apart from the reply (``reasoning_content``).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu35.config.reward_remote import ConsistencyRewardConfig, JudgeRewardConfig, ReplyForm
from emu35.rewards.call import RewardFailed
from emu35.rewards.http import Endpoint, data_url
from emu35.rewards.sample import Cost, Range, Record, Sample, Score, Unscored

Part = Mapping[str, Any]
"""A part of a message's content: text or a picture."""

_LINE = re.compile(r"SCORE: (-?[0-9]{1,15}(?:\.[0-9]{1,15})?)")


class JudgeReward:
    """The number that ``config.model`` gives for an answer's pictures. An answer without a picture
    has no score.

    Raises:
        ConfigError: httpx or the key is missing.
    """

    def __init__(self, config: JudgeRewardConfig) -> None:
        self.range = Range(low=config.scale_low, high=config.scale_high)
        self.cost = Cost.network
        self._config = config
        self._endpoint = Endpoint(config)

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One call a sample.

        Raises:
            RewardFailed: the server did not answer, or not in the form asked for.
        """
        return [self._score(sample) for sample in samples]

    def problems(self, record: Record) -> list[str]:
        """None: a judge knows the prompt and sees the pictures."""
        return []

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def _score(self, sample: Sample) -> Score:
        lacking = self._lacking(sample)
        if lacking is not None:
            return Unscored(lacking)
        config = self._config
        content = [_text(_rubric(config, prompt=sample.prompt))]
        if config.references:
            for number, picture in enumerate(sample.references, start=1):
                content += [_text(f"Reference {number}, given with the request:"), _shown(picture)]
        content += [*self._shown(sample), _text(_asked(config))]
        reply = self._endpoint.post(
            "chat/completions",
            body={
                "model": config.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": config.max_tokens,
                "temperature": 0,
            },
        )
        return read_score(_content(reply), form=config.form, scale=self.range)

    def _lacking(self, sample: Sample) -> str | None:
        """Why there is nothing to judge."""
        return None if sample.pictures else "the answer has no picture"

    def _shown(self, sample: Sample) -> Iterator[Part]:
        for number, picture in enumerate(sample.pictures, start=1):
            if len(sample.pictures) > 1:
                yield _text(f"Picture {number}:")
            yield _shown(picture)


class ConsistencyReward(JudgeReward):
    """The number for a narrative as a whole: its texts and pictures in their order. One of fewer
    than two pictures has no score."""

    def __init__(self, config: ConsistencyRewardConfig) -> None:
        super().__init__(config)

    def _lacking(self, sample: Sample) -> str | None:
        count = len(sample.pictures)
        return None if count > 1 else f"a sequence of {count} pictures has nothing to be consistent"

    def _shown(self, sample: Sample) -> Iterator[Part]:
        for number, (text, picture) in enumerate(
            zip(sample.texts, sample.pictures, strict=False), start=1
        ):
            if text.strip():
                yield _text(f"Text {number}: {text}")
            yield _text(f"Picture {number}:")
            yield _shown(picture)
        if len(sample.texts) > len(sample.pictures) and sample.texts[-1].strip():
            yield _text(f"Text at the end: {sample.texts[-1]}")


def read_score(text: str, *, form: ReplyForm, scale: Range) -> float:
    """The number of a reply in ``form``, space around it allowed and nothing else.

    Raises:
        RewardFailed: the reply has another form, or its number lies outside ``scale``.
    """
    found = _line_score(text) if form is ReplyForm.line else _json_score(text)
    if found is None:
        wanted = _FORMS[form].replace("N", "7")
        raise RewardFailed(f"the judge replied {_excerpt(text)}; wanted is {wanted} alone")
    if not scale.low <= found <= scale.high:
        raise RewardFailed(
            f"the judge's score {found:g} lies outside its scale [{scale.low:g}, {scale.high:g}]"
        )
    return found


_FORMS: Mapping[ReplyForm, str] = {ReplyForm.json: '{"score": N}', ReplyForm.line: "SCORE: N"}


def _line_score(text: str) -> float | None:
    match = _LINE.fullmatch(text.strip())
    return float(match[1]) if match else None


def _json_score(text: str) -> float | None:
    try:
        reply: object = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or not {"score"} <= reply.keys() <= {"score", "reason"}:
        return None
    score: object = reply["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return None
    if not isinstance(reply.get("reason", ""), str):
        return None
    try:
        return float(score) if math.isfinite(score) else None
    except OverflowError:
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ; of two scores neither is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _content(reply: object) -> str:
    """The text of a chat completion.

    Raises:
        RewardFailed: it is none, or was cut off.
    """
    try:
        (choice,) = reply["choices"]  # type: ignore[index]  # whatever is wrong with it, it raises
        content: object = choice["message"]["content"]
        finish: object = choice.get("finish_reason")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        shown = _excerpt(json.dumps(reply))
        raise RewardFailed(f"the server answered no chat completion: {shown}") from error
    if finish in ("length", "content_filter"):
        raise RewardFailed(f"the judge's reply was cut off ({finish}); max_tokens may be too few")
    if not isinstance(content, str):
        raise RewardFailed(f"the judge's reply has no text but {_excerpt(json.dumps(content))}")
    return content


def _rubric(config: JudgeRewardConfig, *, prompt: str) -> str:
    """The rubric with its places filled, once: braces in ``prompt`` stay what they are."""
    values = {
        "{prompt}": prompt,
        "{low}": f"{config.scale_low:g}",
        "{high}": f"{config.scale_high:g}",
    }
    return re.sub(r"\{(prompt|low|high)\}", lambda match: values[match[0]], config.prompt)


def _asked(config: JudgeRewardConfig) -> str:
    return (
        f"Reply with {_FORMS[config.form]} and nothing else, where N is a number from "
        f"{config.scale_low:g} to {config.scale_high:g}."
    )


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _shown(picture: Any) -> Part:
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")
