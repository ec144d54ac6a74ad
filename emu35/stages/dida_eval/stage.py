"""``stage=dida_eval``: the assembly."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from emu35.checkpoint.codec import codec_folder
from emu35.checkpoint.source import Described, describe
from emu35.config import RunConfig, TokenDataConfig, ValidationConfig
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.data.scenes.quality import (
    ScenePrompt,
    read_pictures,
    read_scene_prompts,
    summarise,
)
from emu35.data.scenes.render import render
from emu35.inference.denoiser import needed_denoiser
from emu35.inference.grammar import GridSize
from emu35.inference.request import DenoiseOptions
from emu35.parallel.device import local_device
from emu35.stages.dida_eval.decoders import (
    Asking,
    Codes,
    DecoderRow,
    Decoding,
    Opened,
    build_requests,
    evaluate_decoder,
    open_evaluation,
    pictures_of,
)
from emu35.stages.dida_eval.held_out import (
    HeldOutLosses,
    check_codes,
    shards_of,
    without_cuts,
)
from emu35.stages.dida_eval.report import (
    CLEAN,
    Distances,
    Evaluation,
    Line,
    facts_of,
    page,
    strip,
    table_markdown,
)
from emu35.stages.dida_eval.rows import Rows, digest
from emu35.stages.feature_networks import open_features
from emu35.stages.output import unwritable, write_output
from emu35.stages.picture_features import FeaturesOf, Picture
from emu35.vision.codec import ImageCodec
from emu35.vision.frechet import Gaussian, fit_gaussian, frechet_distance
from emu35.vision.resize import to_pixels

EVALUATION_FILE = "evaluation.json"
TABLE_FILE = "table.md"
PAGE_FILE = "evaluation.html"
SAMPLES = "samples"
PROMPT_PICTURES = "prompts"
"""Name of the held-out set that the prompts' own pictures make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """An evaluation that is known to be possible, with nothing drawn yet."""

    config: RunConfig
    stage: DiDAEvalConfig
    described: Described
    prompts: list[ScenePrompt]
    asking: Asking
    opened: Opened
    features: FeaturesOf
    rows: Rows

    @property
    def vision(self) -> Path | None:
        return Path(self.stage.vision).expanduser() if self.stage.vision else None


def run(config: RunConfig, *, run_dir: Path) -> Evaluation:
    """Evaluate as configured, or go on with what ``run_dir`` holds.

    Raises:
        Emu35Error: for anything a user can mend, before anything is drawn where that can be told.
    """
    work = _prepare(config, run_dir=run_dir)
    true = true_pictures(work.prompts, size=work.asking.size, codec=work.opened.codec)
    seen = _encoded(true, codec=work.opened.codec)
    # Before anything is drawn: what is wrong with the data is then told at once.
    losses = _losses(work, seen=seen)
    rows: list[DecoderRow] = []
    for decoding in decodings(work.stage):
        row, known = work.rows.decoder(
            decoding.name,
            lambda decoding=decoding: evaluate_decoder(
                work.opened.engine,
                work.prompts,
                decoding=decoding,
                asking=work.asking,
                codec=work.opened.codec,
            ),
        )
        rows.append(row)
        _tell(row, known=known)
    lines, notes = _lines(work, rows=rows, true=true, seen=seen)
    evaluation = Evaluation(
        lines=lines,
        losses=losses,
        notes=notes,
        facts=facts_of(config, step=work.described.step, device=_device_name()),
    )
    _write(evaluation, work=work, true=true, run_dir=run_dir)
    return evaluation


def decodings(stage: DiDAEvalConfig) -> list[Decoding]:
    """Every decoder that is to be compared, token by token first."""
    return [
        *(Decoding(again=again) for again in range(stage.ar_seeds)),
        *(
            Decoding(denoise=DenoiseOptions(sampler=sampler, steps=steps))
            for sampler in stage.samplers
            for steps in stage.denoise_steps
        ),
    ]


def _prepare(config: RunConfig, *, run_dir: Path) -> _Work:
    stage = config.stage
    assert isinstance(stage, DiDAEvalConfig)
    assert stage.init_from is not None
    described = describe(Path(stage.init_from).expanduser())
    path = Path(stage.prompts).expanduser()
    prompts = read_scene_prompts(path, count=stage.count or None)
    asking = Asking(
        template=described.template,
        max_positions=described.config.max_position_embeddings,
        size=GridSize(height=stage.size[0], width=stage.size[1]),
        guidance=stage.guidance,
        temperature=stage.temperature,
        text_temperature=stage.text_temperature,
        max_new_tokens=stage.max_new_tokens,
        batch_size=stage.batch_size,
        seed=config.seed,
    )
    opened = open_evaluation(
        described,
        prompts=prompts,
        asking=asking,
        vision=Path(stage.vision).expanduser() if stage.vision else None,
        precision=stage.precision,
    )
    for decoding in decodings(stage):
        # What is wrong with the last decoder is told before the first one draws.
        build_requests(prompts[:1], decoding=decoding, asking=asking, tokenizer=opened.tokenizer)
    features = open_features(stage.features, codec=opened.codec, device=local_device())
    rows = Rows(run_dir=run_dir, size=(stage.size[0], stage.size[1]))
    rows.claim({"step": described.step, "prompts": digest(path), "device": _device_name()})
    return _Work(
        config=config,
        stage=stage,
        described=described,
        prompts=prompts,
        asking=asking,
        opened=opened,
        features=features,
        rows=rows,
    )


def true_pictures(
    prompts: Sequence[ScenePrompt], *, size: GridSize, codec: ImageCodec
) -> list[Picture]:
    """The prompts' scenes as pictures [H, W, 3] of ``size`` codes, which must be square."""
    side = size.height * codec.factor
    return [np.asarray(render(prompt.scene, resolution=side)) for prompt in prompts]


def _encoded(pictures: Sequence[Picture], *, codec: ImageCodec) -> list[Codes]:
    pixels_B3HW = torch.from_numpy(
        np.stack([to_pixels(Image.fromarray(picture)) for picture in pictures])
    )
    return [*codec.encode(pixels_B3HW).cpu().numpy()]


def _lines(
    work: _Work, *, rows: Sequence[DecoderRow], true: Sequence[Picture], seen: Sequence[Codes]
) -> tuple[list[Line], list[str]]:
    """The table, and why it lacks what it lacks. The last two lines are the true pictures through
    the image tokenizer, which is the most that any decoder can show, and as they are."""
    codec, features = work.opened.codec, work.features
    through = pictures_of(seen, codec=codec)
    drawn = [pictures_of(row.codes, codec=codec) for row in rows]
    sets = [[picture for picture in each if picture is not None] for each in (*drawn, through)]
    fits = [fit_gaussian(features(each)) if len(each) > 1 else None for each in sets]
    truth = fit_gaussian(features(true)) if len(true) > 1 else None
    distances = [
        Distances(to_ar=_distance(fit, fits[0]) if at else None, to_true=_distance(fit, truth))
        for at, fit in enumerate(fits)
    ]
    scenes = [prompt.scene for prompt in work.prompts]
    bounds = [
        summarise([item.score for item in read_pictures(each, scenes=scenes)], pictures=len(true))
        for each in (through, true)
    ]
    notes = _notes(fits=[*fits, truth], sets=sets)
    to_ar = _distance(truth, fits[0])
    return [
        *(
            Line(name=row.name, quality=row.quality, row=row, distances=distance)
            for row, distance in zip(rows, distances[:-1], strict=True)
        ),
        Line(name="true, through the tokenizer", quality=bounds[0], distances=distances[-1]),
        Line(name="true", quality=bounds[1], distances=Distances(to_ar=to_ar)),
    ], notes


def _distance(a: Gaussian | None, b: Gaussian | None) -> float | None:
    if a is None or b is None or not (a.enough and b.enough):
        return None
    return frechet_distance(a, b)


def _notes(*, fits: Sequence[Gaussian | None], sets: Sequence[Sequence[Picture]]) -> list[str]:
    known = [fit for fit in fits if fit is not None]
    if not known:
        return ["No Frechet distances: they need at least two pictures."]
    few = min(len(each) for each in sets)
    if all(fit.enough for fit in known) and len(known) == len(fits):
        return []
    return [
        f"Frechet distances that are missing would be of too few pictures: a set of {few} in "
        f"{known[0].dimensions} dimensions, where at least {known[0].dimensions + 1} are needed."
    ]


def _losses(work: _Work, *, seen: Sequence[Codes]) -> dict[str, dict[str, float | None]]:
    """By held-out set and time."""
    data = work.config.data
    assert isinstance(data, TokenDataConfig)
    source = needed_denoiser(work.described, chosen=work.vision)
    losses = HeldOutLosses(
        model=work.opened.engine.model.eval(),
        path=source.open(local_device()).path,
        vocabulary=work.opened.tokenizer.vocabulary,
        template=work.described.template,
        data=without_cuts(data),
        seed=work.config.seed,
    )
    with ExitStack() as stack:
        sections = _sections(work, seen=seen, stack=stack)
        return {
            name: _by_time(name, section=section, losses=losses, work=work)
            for name, section in sections.items()
        }


def _by_time(
    name: str, *, section: ValidationConfig, losses: HeldOutLosses, work: _Work
) -> dict[str, float | None]:
    rows = work.rows
    noisy = {
        f"{time:g}": rows.loss(
            f"loss_{name}_t{time:g}", lambda time=time: losses.noisy(section, time=time)
        )
        for time in work.stage.times
    }
    clean = rows.loss(f"loss_{name}_clean", lambda: losses.clean(section))
    return {**noisy, CLEAN: clean}


def _sections(
    work: _Work, *, seen: Sequence[Codes], stack: ExitStack
) -> Mapping[str, ValidationConfig]:
    data = work.config.data
    assert isinstance(data, TokenDataConfig)
    if data.validation or not work.stage.times:
        vision = codec_folder(work.described, chosen=work.vision)
        assert vision is not None  # its codec is open
        for section in data.validation.values():
            check_codes(section, vocabulary=work.opened.tokenizer.vocabulary, vision=vision)
        return data.validation
    count = min(work.stage.documents, len(work.prompts))
    made = shards_of(
        work.prompts[:count],
        codes=seen[:count],
        template=work.described.template,
        tokenizer=work.opened.tokenizer,
        kind=str(work.described.tokenizer.kind),
    )
    return {PROMPT_PICTURES: stack.enter_context(made)}


def _write(evaluation: Evaluation, *, work: _Work, true: Sequence[Picture], run_dir: Path) -> None:
    drawn = [
        pictures_of(line.row.codes[: work.stage.shown], codec=work.opened.codec)
        for line in evaluation.lines
        if line.row
    ]
    samples = run_dir / SAMPLES
    try:
        samples.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(samples, error) from error
    strips: list[tuple[str, bytes]] = []
    for at, prompt in enumerate(work.prompts[: work.stage.shown]):
        png = strip([true[at], *(pictures[at] for pictures in drawn)], like=true[at])
        write_output(samples / f"{at:03d}.png", content=png)
        strips.append((prompt.prompt, png))
    found: dict[str, Any] = evaluation.to_json()
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_output(run_dir / EVALUATION_FILE, content=text.encode("ascii"))
    table = table_markdown(evaluation)
    write_output(run_dir / TABLE_FILE, content=table.encode())
    write_output(run_dir / PAGE_FILE, content=page(evaluation, strips=strips).encode())
    print(table, end="", flush=True)


def _tell(row: DecoderRow, *, known: bool) -> None:
    done = "done before" if known else f"{row.seconds:.3f} s a picture"
    print(
        f"{row.name}: accuracy {row.quality.accuracy.value:.1%}, right "
        f"{row.quality.right.value:.1%}, {row.forwards:.1f} forwards; {done}",
        flush=True,
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
