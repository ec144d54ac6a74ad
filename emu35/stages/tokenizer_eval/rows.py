"""Which figures there are, how they are written, and what they may be compared with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from emu35.stages.tokenizer_eval.summary import Sizes, sizes_of
from emu35.vision.fidelity import PSNR_CAP

TOKBENCH = (
    "a substitute for TokBench's (arXiv 2505.18142) and not comparable with it: other pictures and "
    "other networks"
)


class Better(Enum):
    """Which way a figure is better."""

    higher = "higher"
    lower = "lower"
    neither = "neither"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of the table: a figure, how it is written, and what it is."""

    key: str
    title: str
    better: Better
    form: str
    label: str


def rows_of(settings: Mapping[str, Any], *, bounds: Sequence[float]) -> Iterator[Row]:
    """All rows in their order; ``settings`` are those of the results, ``bounds`` the heights at
    which text is told apart."""
    yield from _pixel_rows()
    yield from _network_rows(backbone=settings["lpips_backbone"])
    yield from _code_rows()
    for sizes in (None, *sizes_of(bounds)):
        yield from _text_rows(sizes)
    yield Row(
        key="face_similarity",
        title="face similarity",
        better=Better.higher,
        form=".4f",
        label=(
            "mean cosine of face embeddings, original and reconstruction cut at the original's "
            f"places, by {settings['face_embedder']}; {TOKBENCH}"
        ),
    )


def _pixel_rows() -> Iterator[Row]:
    yield Row(
        key="psnr",
        title="PSNR, dB",
        better=Better.higher,
        form=".2f",
        label=(
            "mean over pictures of 10 log10(255^2 / mean squared error) of 8-bit RGB, "
            f"{PSNR_CAP:g} at the most"
        ),
    )
    yield Row(
        key="ssim",
        title="SSIM",
        better=Better.higher,
        form=".4f",
        label=(
            "mean over pictures and RGB; Gaussian windows of 11 x 11, sigma 1.5 (doi "
            "10.1109/TIP.2003.819861)"
        ),
    )


def _network_rows(*, backbone: str) -> Iterator[Row]:
    yield Row(
        key="lpips",
        title=f"LPIPS ({backbone})",
        better=Better.lower,
        form=".4f",
        label=f"mean over pictures, version 0.1 over {backbone} (arXiv 1801.03924)",
    )
    yield Row(
        key="rfid",
        title="rFID",
        better=Better.lower,
        form=".4g",
        label=(
            "Frechet distance of reconstructions to originals in the space of Inception-v3 as "
            "torch-fidelity has it (arXiv 1706.08500); falls as the number of pictures grows"
        ),
    )
    yield Row(
        key="frechet_wavelets",
        title="Frechet, wavelets (not FID)",
        better=Better.lower,
        form=".4g",
        label=(
            "Frechet distance in a space of 42 wavelet energies (emu35/vision/wavelets.py): "
            "texture alone. Not FID, and comparable with nothing but itself"
        ),
    )


def _code_rows() -> Iterator[Row]:
    yield Row(
        key="codebook_usage",
        title="codebook used",
        better=Better.higher,
        form=".2%",
        label="share of the codebook's entries that occur; grows with the number of codes",
    )
    yield Row(
        key="codebook_perplexity",
        title="codebook perplexity",
        better=Better.higher,
        form=".1f",
        label="2 to the entropy of the codes' frequencies; grows with the number of codes",
    )
    yield Row(
        key="bits_per_pixel",
        title="bits per pixel",
        better=Better.neither,
        form=".4f",
        label="log2(codebook size) / factor^2",
    )
    yield Row(
        key="entropy_bits_per_pixel",
        title="bits per pixel, entropy",
        better=Better.neither,
        form=".4f",
        label="entropy of the codes' frequencies / factor^2",
    )


def _text_rows(sizes: Sizes | None) -> Iterator[Row]:
    key = f"_{sizes.key}" if sizes else ""
    where = f", {sizes.title}" if sizes else ""
    yield Row(
        key=f"text_accuracy{key}",
        title=f"words read{where}",
        better=Better.higher,
        form=".1%",
        label=(
            "share of words (between white space, case ignored) that rapidocr reads off the "
            f"reconstruction in their order; {TOKBENCH}"
        ),
    )
    yield Row(
        key=f"text_edit_distance{key}",
        title=f"text edit distance{where}",
        better=Better.lower,
        form=".4f",
        label=(
            "mean over lines of the edit distance over the longer text's length (case and white "
            f"space ignored); {TOKBENCH}"
        ),
    )
