"""Token ids that a client sends: inside the vocabulary, and every image in them whole.

The model would take anything; but an image cut short or ragged puts it where training never was,
and the answer would be noise without a word of why.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emu35.stages.serve.refusal import Refusal
from emu35.tokens.text import TextTokenizer

_SIZE = re.compile(r"([1-9][0-9]{0,5})\*([1-9][0-9]{0,5})")
_LONGEST_SIZE = 13


def check_ids(ids: Sequence[int], *, tokenizer: TextTokenizer, name: str, max_length: int) -> None:
    """Refuse ids that no prompt can have. ``name`` is the field they came in, ``max_length`` how
    many there may be at most, which is looked at before they are.

    Raises:
        Refusal: naming the position, the id and the rule.
    """
    if len(ids) > max_length:
        raise Refusal(
            f"{name}: {len(ids)} ids; this server holds {max_length} tokens of prompt and answer: "
            "shorten it",
            param=name,
            code="context_length_exceeded",
        )
    vocabulary = tokenizer.vocabulary

    def refuse(position: int, problem: str) -> Refusal:
        return Refusal(
            f"{name}: id {ids[position]} at position {position}: {problem}",
            param=name,
            code="invalid_token_ids",
        )

    wrong = next((at for at, id in enumerate(ids) if not 0 <= id < vocabulary.size), None)
    if wrong is not None:
        raise refuse(
            wrong,
            f"ids must lie in 0..{vocabulary.size - 1}; use the tokenizer of this model",
        )
    values = np.asarray(ids, dtype=np.int64)
    inside = np.isin(values, [vocabulary.eol, vocabulary.img, vocabulary.eoi])
    inside |= values >= vocabulary.visual_start
    begins = np.flatnonzero(values == vocabulary.boi)
    position = 0
    for begin in [*begins.tolist(), len(ids)]:
        stray = np.flatnonzero(inside[position:begin])
        if begin < position or len(stray):
            at = begin if begin < position else position + int(stray[0])
            raise refuse(at, f"outside an image; one begins with {vocabulary.boi} and its size")
        if begin < len(ids):
            position = _image_end(values, begin=begin, tokenizer=tokenizer, refuse=refuse)


def _image_end(values: NDArray[np.int64], *, begin: int, tokenizer: TextTokenizer, refuse) -> int:
    """One past the EOI of the image that begins at ``begin``."""
    vocabulary = tokenizer.vocabulary
    window = values[begin + 1 : begin + 2 + _LONGEST_SIZE]
    marks = np.flatnonzero(window == vocabulary.img)
    spelled = window[: marks[0]].tolist() if len(marks) else []
    match = _SIZE.fullmatch(tokenizer.decode(spelled))
    if match is None or tokenizer.encode(match[0]) != spelled:
        raise refuse(
            begin,
            f"the image that begins here names no size; {vocabulary.boi} is followed by height*"
            f"width, one token a character, and {vocabulary.img}",
        )
    height, width = int(match[1]), int(match[2])
    what = f"the {height}*{width} image that begins at position {begin}"
    first = begin + 1 + len(spelled) + 1
    body = values[first : first + height * (width + 1)]
    places = np.arange(1, len(body) + 1)
    wanted = np.where(places % (width + 1) == 0, vocabulary.eol, -1)
    if len(body) == height * (width + 1):
        wanted[-1] = vocabulary.eoi
    wrong = np.flatnonzero(np.where(wanted < 0, body < vocabulary.visual_start, body != wanted))
    if len(wrong):
        row, column = divmod(int(wrong[0]), width + 1)
        end = vocabulary.eoi if row == height - 1 else vocabulary.eol
        rule = (
            f"row {row} of {what} has {column} codes; every row has {width}"
            if column < width
            else f"row {row} of {what} must end here, with {end}"
        )
        raise refuse(first + int(wrong[0]), rule)
    if len(body) < height * (width + 1):
        raise refuse(
            len(values) - 1,
            f"the prompt ends inside {what}; give all its rows and {vocabulary.eoi}",
        )
    return first + len(body)
