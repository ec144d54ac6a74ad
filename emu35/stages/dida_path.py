"""``emu35 dida fit-path``: the metric path's numbers for an image tokenizer, and their plot."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from emu35.config.check import at_least
from emu35.data.index import find_shards, read_index
from emu35.data.source import Source, check_vision
from emu35.dida.fit import PathCurve, PathFit, fit_path, sample_codes
from emu35.errors import ConfigError, DataError
from emu35.log.charts import Series, chart_page, line_chart
from emu35.stages.output import unwritable, write_output
from emu35.tokens.serialize import Modality
from emu35.vision.codec import read_codebook, weights_digest

FIT_FILE, PAGE_FILE = "path.json", "path.html"

COUNTED = 1 << 24
"""Codes that are read of all shards together, taken from documents evenly spaced."""


@dataclass(kw_only=True, slots=True)
class FitPathOptions:
    """``emu35 dida fit-path``.

    Attributes:
        vision: folder of the image tokenizer.
        out: folder for the numbers and their page; made if need be.
        shards: folders of token shards, whose codes count as often as they occur; without any, all
            codes of the codebook count alike.
        codes: codes x1 that means are taken over, drawn with ``seed``.
        force: write over what ``out`` holds.
    """

    vision: Path
    out: Path
    shards: list[Path] = field(default_factory=list[Path])
    codes: int = 256
    seed: int = 0
    force: bool = False

    def validate(self) -> None:
        """Raises: ConfigError naming every problem."""
        if problems := list(self._problems()):
            raise ConfigError(problems)

    def _problems(self) -> Iterator[str]:
        yield from at_least("fit-path", 1, codes=self.codes)
        if not 0 <= self.seed < 2**32:
            yield f"fit-path.seed={self.seed} must lie in 0..{2**32 - 1}"
        if self.out.exists() and not self.out.is_dir():
            yield f"{self.out} is a file; name a folder for {FIT_FILE} and {PAGE_FILE}"
        held = [name for name in (FIT_FILE, PAGE_FILE) if (self.out / name).exists()]
        if held and not self.force:
            yield (
                f"{self.out} already holds {' and '.join(held)}; name another folder, or write "
                "over with --force"
            )


def fit_path_numbers(options: FitPathOptions) -> PathFit:
    """Fit, print what was found and what to paste, and write both files.

    Raises:
        ConfigError, DataError, ReleaseError: the options, the shards or the tokenizer cannot be
            used, or the files not be written.
    """
    options.validate()
    codebook_KD = read_codebook(options.vision)
    counts_K = torch.ones(len(codebook_KD), dtype=torch.int64)
    if options.shards:
        counts_K = _count_codes(
            options.shards, vision=options.vision, codebook_size=len(codebook_KD)
        )
    sample = sample_codes(counts_K, codes=options.codes, seed=options.seed)
    fit = fit_path(codebook_KD, sample=sample)
    print("\n".join(_lines(fit, options=options, shape=codebook_KD.shape)))
    _write(fit, options=options, shape=codebook_KD.shape)
    print(f"{options.out / FIT_FILE}, {options.out / PAGE_FILE}")
    return fit


def _count_codes(folders: list[Path], *, vision: Path, codebook_size: int) -> torch.Tensor:
    """How often each code occurs in the shards, int64 [K].

    Raises:
        DataError: they hold no pictures, or pictures of another tokenizer.
    """
    sources = [_open(folder, vision=vision, codebook_size=codebook_size) for folder in folders]
    encoded = check_vision(sources)
    if encoded is not None and encoded.digest != (ours := weights_digest(vision)):
        raise DataError(
            f"shard {encoded.shard} holds pictures encoded by an image tokenizer with weights "
            f"{encoded.digest[:12]}, but {vision} has weights {ours[:12]}; give the tokenizer that "
            "the shards were made with, or other shards"
        )
    total = sum(int(source.modality[:, Modality.VISUAL].sum()) for source in sources)
    if total == 0:
        raise DataError(
            f"{', '.join(map(str, folders))}: no document has a picture; give shards with "
            "pictures, or none, and all codes count alike"
        )
    counts_K = np.zeros(codebook_size, np.int64)
    for source in sources:
        pictured = np.flatnonzero(source.modality[:, Modality.VISUAL])
        first = source.metas[0].vocabulary().visual_start
        for tokens, _ in source.read(pictured[:: -(-total // COUNTED)]):
            codes = tokens[tokens >= first].astype(np.int64) - first
            counts_K += np.bincount(codes, minlength=codebook_size)
    return torch.from_numpy(counts_K)


def _open(folder: Path, *, vision: Path, codebook_size: int) -> Source:
    meta = read_index(find_shards(folder)[0]).meta
    if meta.codebook_size != codebook_size:
        raise DataError(
            f"the shards in {folder} were made with codebook_size={meta.codebook_size}, but the "
            f"image tokenizer in {vision} has {codebook_size} codes; give the one that made them"
        )
    return Source(name=folder.name, path=folder, vocabulary=meta.vocabulary())


def _lines(fit: PathFit, *, options: FitPathOptions, shape: torch.Size) -> list[str]:
    """The table, and what a configuration needs."""
    among = "as often as they occur in the shards" if options.shards else "all alike"
    rows = [("usual", fit.usual), ("fitted", fit.fitted)]
    return [
        f"{options.vision}: {shape[0]:,} codes of {shape[1]} numbers; means over {fit.codes:,} "
        f"of them, {among}",
        "mean distance to the original, as a share of that of noise; 1 - t is wanted",
        f"{'':8} {'c':>8} {'alpha':>8} {'t=.25':>7} {'t=.5':>7} {'t=.75':>7} {'deviation':>10}",
        *(f"{name:8} {_row(curve)}" for name, curve in rows),
        "",
        "stage:",
        "  path:",
        f"    c: {fit.fitted.c}",
        f"    alpha: {fit.fitted.alpha}",
        "",
    ]


def _row(curve: PathCurve) -> str:
    quarters = (len(curve.times) - 1) // 4
    shares = " ".join(f"{curve.distance[quarters * n]:7.3f}" for n in (1, 2, 3))
    return f"{curve.c:8g} {curve.alpha:8g} {shares} {curve.deviation:10.4f}"


def _write(fit: PathFit, *, options: FitPathOptions, shape: torch.Size) -> None:
    facts = {
        "c": fit.fitted.c,
        "alpha": fit.fitted.alpha,
        "vision": str(options.vision),
        "codebook": list(shape),
        "shards": [str(folder) for folder in options.shards],
        "codes": fit.codes,
        "seed": options.seed,
        "usual": asdict(fit.usual),
        "fitted": asdict(fit.fitted),
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(options.out, error) from error
    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    write_output(options.out / FIT_FILE, content=text.encode())
    page = draw_fit(fit, vision=options.vision, seed=options.seed)
    write_output(options.out / PAGE_FILE, content=page.encode())


def draw_fit(fit: PathFit, *, vision: Path, seed: int) -> str:
    """The page: both paths beside the straight line, and how many codes they leave as they are."""
    named = [
        (f"{name} (c {curve.c:g}, alpha {curve.alpha:g})", curve)
        for name, curve in (("usual", fit.usual), ("fitted", fit.fitted))
    ]
    times = fit.usual.times
    distance = [
        Series(
            name=name,
            points=list(zip(curve.times, curve.distance, strict=True)),
            newest=curve.deviation,
        )
        for name, curve in named
    ]
    line = Series(name="1 - t", points=[(t, 1 - t) for t in (times[0], times[-1])], newest=0.0)
    half = len(times) // 2
    unchanged = [
        Series(
            name=name,
            points=list(zip(curve.times, curve.unchanged, strict=True)),
            newest=curve.unchanged[half],
        )
        for name, curve in named
    ]
    charts = [
        line_chart(
            [*distance, line],
            x_label="t",
            title="Mean distance to the original, of noise = 1 (bold: mean deviation from 1 - t)",
        ),
        line_chart(unchanged, x_label="t", title="Share of unchanged codes (bold: at t = 0.5)"),
    ]
    lead = (
        f"Corruption by the metric path, from noise at t = 0 to the picture at t = 1, with the "
        f"codebook of {vision}; means over {fit.codes:,} codes (seed {seed})."
    )
    return chart_page("".join(charts), title="Metric path", lead=lead)
