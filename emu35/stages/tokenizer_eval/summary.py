"""Records into figures, and reasons for those that are missing."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from emu35.stages.tokenizer_eval.instruments import Group
from emu35.stages.tokenizer_eval.measure import INCEPTION, WAVELETS, Resolution
from emu35.stages.tokenizer_eval.reading import LineFigures
from emu35.stages.tokenizer_eval.records import Findings
from emu35.vision.code_usage import code_usage
from emu35.vision.fidelity import is_capped
from emu35.vision.frechet import Gaussian, Moments, frechet_distance


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Lines of a height in [``low``, ``high``), shares of the picture's; of unknown height where
    ``low`` is None."""

    low: float | None
    high: float = 1.0

    @property
    def key(self) -> str:
        """Fit for the name of a figure: ``0.05_0.1``."""
        return "unknown" if self.low is None else f"{self.low:g}_{self.high:g}"

    @property
    def title(self) -> str:
        return (
            "height unknown"
            if self.low is None
            else f"height {100 * self.low:g} to {100 * self.high:g}%"
        )

    def holds(self, height: float | None) -> bool:
        if self.low is None or height is None:
            return self.low is None and height is None
        return self.low <= height < self.high or (height >= self.high >= 1)


def sizes_of(bounds: Sequence[float]) -> list[Sizes]:
    """The ranges that rising ``bounds`` divide, and that of lines whose place is not known."""
    edges = [0.0, *bounds, 1.0]
    ranges = [Sizes(low=low, high=high) for low, high in pairwise(edges)]
    return [*ranges, Sizes(low=None)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of a figure over pictures; ``deviation`` is the standard deviation."""

    deviation: float
    lowest: float
    median: float
    highest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Figures by key, None where they could not be measured; ``counts`` say of how many."""

    figures: Mapping[str, float | None]
    counts: Mapping[str, int]
    spreads: Mapping[str, Spread] = field(default_factory=dict[str, Spread])

    def to_json(self) -> dict[str, Any]:
        spreads = {key: asdict(spread) for key, spread in self.spreads.items()}
        return {**self.figures, "counts": dict(self.counts), "spread": spreads}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summaries:
    """Those of one resolution: by tokenizer, and of the originals, whose text is read too.
    ``missing`` has a reason for every figure that no tokenizer has."""

    side: int
    pictures: int
    enlarged: int
    tokenizers: Mapping[str, Summary]
    originals: Summary
    missing: Mapping[str, str]


def summarise(
    found: Resolution,
    *,
    factors: Mapping[str, int],
    bounds: Sequence[float],
    missing: Mapping[Group, str],
) -> Summaries:
    """Figures of one resolution; ``factors`` are the tokenizers', ``bounds`` of text heights, and
    ``missing`` what could not be opened."""
    tokenizers = {
        name: _summary(each, originals=found.originals, factor=factors[name], bounds=bounds)
        for name, each in found.tokenizers.items()
    }
    text = dict(_text(found.originals.lines, bounds=bounds))
    return Summaries(
        side=found.side,
        pictures=found.pictures,
        enlarged=found.enlarged,
        tokenizers=tokenizers,
        originals=Summary(figures=text, counts={"lines": len(found.originals.lines)}),
        missing=dict(_reasons(found, tokenizers=tokenizers, missing=missing)),
    )


def _summary(
    found: Findings, *, originals: Findings, factor: int, bounds: Sequence[float]
) -> Summary:
    pixels = {
        "psnr": [each.psnr for each in found.pictures],
        "ssim": [each.ssim for each in found.pictures],
        "lpips": [each.lpips for each in found.pictures if each.lpips is not None],
        "face_similarity": [cosine for each in found.pictures for cosine in each.faces],
    }
    usage = code_usage(found.counts_K)
    figures: dict[str, float | None] = {
        "psnr": _mean(pixels["psnr"]),
        "ssim": _mean(pixels["ssim"]),
        "lpips": _mean(pixels["lpips"]),
        "rfid": _distance(found, originals=originals, space=INCEPTION),
        "frechet_wavelets": _distance(found, originals=originals, space=WAVELETS),
        "codebook_usage": usage.usage,
        "codebook_perplexity": usage.perplexity,
        "bits_per_pixel": usage.bits_per_pixel(factor=factor),
        "entropy_bits_per_pixel": usage.entropy_bits_per_pixel(factor=factor),
        **dict(_text(found.lines, bounds=bounds)),
        "face_similarity": _mean(pixels["face_similarity"]),
    }
    counts = {
        "pictures": len(found.pictures),
        "psnr_capped": sum(is_capped(decibels) for decibels in pixels["psnr"]),
        "codes": usage.codes,
        "codes_used": usage.used,
        "lines": len(found.lines),
        "words": sum(line.words for line in found.lines),
        "faces": len(pixels["face_similarity"]),
    }
    spreads = {key: _spread(values) for key, values in pixels.items() if values}
    return Summary(figures=figures, counts=counts, spreads=spreads)


def _text(
    lines: Sequence[LineFigures], *, bounds: Sequence[float]
) -> Iterator[tuple[str, float | None]]:
    """Shares of words and edit distances, of all lines and by height."""
    yield from _text_of(lines, key="")
    for sizes in sizes_of(bounds):
        chosen = [line for line in lines if sizes.holds(line.height)]
        yield from _text_of(chosen, key=f"_{sizes.key}")


def _text_of(lines: Sequence[LineFigures], *, key: str) -> Iterator[tuple[str, float | None]]:
    words = sum(line.words for line in lines)
    right = sum(line.right for line in lines)
    yield f"text_accuracy{key}", right / words if words else None
    yield f"text_edit_distance{key}", _mean([line.distance for line in lines])


def _reasons(
    found: Resolution, *, tokenizers: Mapping[str, Summary], missing: Mapping[Group, str]
) -> Iterator[tuple[str, str]]:
    keys = next(iter(tokenizers.values())).figures
    for key in keys:
        if any(summary.figures[key] is not None for summary in tokenizers.values()):
            continue
        group = group_of(key)
        yield key, missing.get(group) or _too_few(group, found=found)


def _too_few(group: Group, *, found: Resolution) -> str:
    """Why a figure is missing that could have been measured."""
    if group in (Group.fid, Group.wavelets):
        moments = found.originals.moments[INCEPTION if group is Group.fid else WAVELETS]
        return (
            f"{moments.count} pictures are too few for a distance in {len(moments.sum_D)} "
            f"dimensions; needs at least {len(moments.sum_D) + 1}"
        )
    return {
        Group.text: "no picture has such a line",
        Group.faces: "no face was found in the originals",
    }.get(group, "there was no picture")


def group_of(key: str) -> Group:
    """The measure that the figure ``key`` is one of."""
    known = {
        "psnr": Group.pixels,
        "ssim": Group.pixels,
        "lpips": Group.lpips,
        "rfid": Group.fid,
        "frechet_wavelets": Group.wavelets,
        "face_similarity": Group.faces,
    }
    return known.get(key) or (Group.text if key.startswith("text_") else Group.codes)


def _distance(found: Findings, *, originals: Findings, space: str) -> float | None:
    a, b = (_gaussian(each.moments.get(space)) for each in (found, originals))
    if a is None or b is None or not (a.enough and b.enough):
        return None
    return frechet_distance(a, b)


def _gaussian(moments: Moments | None) -> Gaussian | None:
    return None if moments is None else moments.gaussian()


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread(values: Sequence[float]) -> Spread:
    return Spread(
        deviation=statistics.stdev(values) if len(values) > 1 else 0.0,
        lowest=min(values),
        median=statistics.median(values),
        highest=max(values),
    )
