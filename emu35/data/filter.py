"""Leaving documents of a source out by what its index tells of them."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from emu35.config.data import FilterConfig
from emu35.data.source import Source
from emu35.tokens.serialize import Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Filtered:
    """What a filter leaves: ``keep`` [N], and in words how many documents each bound left out, a
    document by the first bound that it breaks; None where it left out none."""

    keep: npt.NDArray[np.bool_]
    left_out: str | None


def describe_filter(bounds: FilterConfig | None) -> str:
    """The bounds that are given, in words: equal if and only if they are."""
    given = [
        f"{field.name}={value}"
        for field in fields(bounds or FilterConfig)
        if (value := getattr(bounds, field.name, None)) is not None
    ]
    return ", ".join(given) or "none"


def apply_filter(source: Source, *, bounds: FilterConfig) -> Filtered:
    """The documents of ``source`` that lie within ``bounds``; no shard is read."""
    keep = np.ones(len(source), bool)
    words: list[str] = []
    for what in ("tokens", "pictures", "visual_share"):
        low: float | None = getattr(bounds, f"min_{what}")
        high: float | None = getattr(bounds, f"max_{what}")
        if low is None and high is None:
            continue
        values_N = _measure(source, what=what)
        for name, bound, breaks_N in (
            (f"min_{what}", low, None if low is None else values_N < low),
            (f"max_{what}", high, None if high is None else values_N > high),
        ):
            if breaks_N is not None:
                if count := int(np.count_nonzero(keep & breaks_N)):
                    words.append(f"{count} by filter.{name}={bound}")
                keep &= ~breaks_N
    if not words:
        return Filtered(keep=keep, left_out=None)
    return Filtered(
        keep=keep,
        left_out=(
            f"source {source.name!r} ({source.path}): {int((~keep).sum())} of {len(source)} "
            f"documents are left out: {', '.join(words)}"
        ),
    )


def _measure(source: Source, *, what: str) -> npt.NDArray[np.float64]:
    """[N], what a bound is about."""
    if what == "tokens":
        return source.length.astype(np.float64)
    if what == "pictures":
        return source.pictures.astype(np.float64)
    return source.modality[:, Modality.VISUAL] / source.length
