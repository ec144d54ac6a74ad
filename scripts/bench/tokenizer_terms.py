"""What terms of the image tokenizer's objective change, on the demo's pictures.

    python scripts/bench/tokenizer_terms.py [DEMO] [--out OUT] [--pictures DIR] [KEY=VALUE ...]

DEMO (default runs/demo) is a demo that has made its corpus. ``experiment=demo/ibq`` is trained once
for every variant, from the same weights on the same crops in the same order:

- ``pixels``: the demo's own, absolute and squared error;
- ``entropy``: pixels, and the entropy term;
- ``perceptual``: pixels, and LPIPS over VGG16 (its weights are fetched once);
- ``adversarial``: perceptual, and a PatchGAN from two thirds of the steps on.

Weights keep the usual ratios to the absolute error: 1 for LPIPS, 0.1 for the PatchGAN, 0.05 for the
entropy. Held-out scenes then go through ``experiment=eval/tokenizer``, with LPIPS over AlexNet,
which none of them was trained on. Finished runs are not made again. KEY=VALUE goes to every
training.

OUT (default runs/tokenizer_terms) gets a run folder a variant, the evaluation with its page,
``terms.svg`` (curves of held-out PSNR and of codes in use) and ``terms.png`` (the same pictures
through all of them); DIR, if given, gets the latter two as well. The last line is JSON: for every
variant PSNR in dB, SSIM, LPIPS, the Frechet distance in a space of wavelets, and the share of codes
in use with their perplexity.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from emu35.log.charts import Series, line_charts_svg
from emu35.vision.codec import load_codec
from emu35.vision.lpips import Backbone
from emu35.vision.lpips_fetch import fetch_lpips

ABSOLUTE = 0.2
"""The demo's weight of the absolute error, which the paper's others are relative to."""

FIGURES = ("psnr", "ssim", "lpips", "frechet_wavelets", "codebook_usage", "codebook_perplexity")
CURVES = {"Held-out PSNR, dB": "val/psnr", "Share of codes in use": "val/codebook_usage"}
SIDE, LABEL, SCENES, PHOTOS = 128, 96, 5, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer_terms"))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--steps", type=int, default=1700)
    options, overrides = parser.parse_known_args()
    if unknown := [each for each in overrides if each.startswith("-") or "=" not in each]:
        parser.error(f"unknown: {' '.join(unknown)}; overrides have the form KEY=VALUE")
    corpus = options.demo / "corpus"
    if not corpus.is_dir():
        raise SystemExit(f"{corpus} does not exist; run scripts/demo.sh --until corpus first")
    found = variants(options.steps)
    for name, terms in found.items():
        train(options.out / name, corpus=corpus, overrides=[*terms, *overrides])
    figures = evaluate(list(found), out=options.out, corpus=corpus)
    draw_curves(list(found), out=options.out)
    draw_pictures(list(found), out=options.out, corpus=corpus)
    if options.pictures is not None:
        for file in ("terms.svg", "terms.png"):
            shutil.copyfile(options.out / file, options.pictures / file)
    print(json.dumps(figures))
    return 0


def variants(steps: int) -> dict[str, list[str]]:
    """What each adds to the demo's configuration."""
    common = [f"stage.steps={steps}", f"stage.validate_every={max(1, steps // 17)}"]
    perceptual = [
        *common,
        f"stage.perceptual.weight={ABSOLUTE}",
        f"stage.perceptual.weights={fetch_lpips(Backbone.vgg16)}",
    ]
    return {
        "pixels": common,
        "entropy": [*common, f"stage.entropy.weight={0.05 * ABSOLUTE}"],
        "perceptual": perceptual,
        "adversarial": [
            *perceptual,
            f"stage.adversarial.weight={0.1 * ABSOLUTE}",
            f"stage.adversarial.start_step={2 * steps // 3}",
            f"stage.adversarial.discriminator_start={steps // 2}",
            "stage.adversarial.layers=2",  # three see more than a crop of 32 pixels
            "stage.adversarial.ndf=32",
        ],
    }


def train(run_dir: Path, *, corpus: Path, overrides: Sequence[str]) -> None:
    scenes = corpus / "scenes"
    paths = [scenes / "train-00000.tar", scenes / "words-00000.tar", corpus / "photos"]
    emu35(
        "experiment=demo/ibq",
        f"run_dir={run_dir}",
        f"data.paths=[{','.join(map(str, paths))}]",
        f"data.validation_paths=[{scenes / 'val-00000.tar'}]",
        *overrides,
    )


def evaluate(names: Sequence[str], *, out: Path, corpus: Path) -> dict[str, dict[str, float]]:
    """:data:`FIGURES` of every variant."""
    folders = ",".join(f"{name}: {out / name / 'vision_tokenizer'}" for name in names)
    run_dir = out / "evaluation"
    emu35(
        "experiment=eval/tokenizer",
        f"run_dir={run_dir}",
        "~stage.tokenizers.demo",
        f"+stage.tokenizers={{{folders}}}",
        f"stage.pictures=[{corpus / 'scenes' / 'val-00000.tar'}]",
        f"stage.lpips.weights={fetch_lpips(Backbone.alexnet)}",
        "stage.text.generated=0",
    )
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    (measured,) = results["resolutions"].values()
    return {
        name: {key: round(found[key], 4) for key in FIGURES}
        for name, found in measured["tokenizers"].items()
    }


def emu35(*overrides: str) -> None:
    """Run a stage; its messages go to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "emu35", "run", *overrides], check=False, stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"emu35 run ended with {done.returncode}; see its message above")


def draw_curves(names: Sequence[str], *, out: Path) -> None:
    """``terms.svg``."""
    charts = {
        title: [Series(name=name, points=points(out / name, key=key)) for name in names]
        for title, key in CURVES.items()
    }
    svg = line_charts_svg(charts, x_label="step", lowest=None)
    (out / "terms.svg").write_text(svg, encoding="utf-8")


def points(run_dir: Path, *, key: str) -> list[tuple[float, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [(row["step"], row[key]) for row in rows if key in row]


def draw_pictures(names: Sequence[str], *, out: Path, corpus: Path) -> None:
    """``terms.png``: a row of originals, one of each variant; held-out scenes, then photographs
    that all were trained on."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
    from summary import named_photos, named_scenes
    from through import through

    originals = [
        *(image for _, image in list(named_scenes(corpus / "scenes" / "val-00000.tar"))[:SCENES]),
        *(image for _, image in list(named_photos(corpus / "photos"))[:PHOTOS]),
    ]
    rows: dict[str, list[Image.Image]] = {"original": []}
    for name in names:
        codec = load_codec(out / name / "vision_tokenizer")
        both = [through(codec, image, resolution=64) for image in originals]
        rows["original"] = [original for original, _ in both]
        rows[name] = [decoded for _, decoded in both]
    sheet = Image.new("RGB", (LABEL + len(originals) * SIDE, len(rows) * SIDE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for at, (name, pictures) in enumerate(rows.items()):
        pen.text((4, at * SIDE + SIDE // 2 - 8), name, fill="#333333", font=font)
        for place, picture in enumerate(pictures):
            large = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, (LABEL + place * SIDE, at * SIDE))
    sheet.quantize(192).save(out / "terms.png", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
