"""``emu35 data inspect --run``: which documents a step of a run was trained on."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu35.checkpoint.manifest import DamagedError, check_file, read_manifest
from emu35.checkpoint.steps import CHECKPOINTS, list_steps, step_folder
from emu35.config import LMStageConfig, RunConfig, TokenDataConfig
from emu35.config.dida import DiDAConfig
from emu35.config.io import read_config
from emu35.data.ingest.progress import Progress
from emu35.data.loader import LOADER_FILE
from emu35.data.opening import open_plan
from emu35.data.place import Url, place_of
from emu35.data.show import ShownDocument, show_document
from emu35.data.source import Source
from emu35.data.trace import Piece, Position, Row, check_position, rows_of_step
from emu35.errors import ConfigError
from emu35.log.jsonl import read_rows
from emu35.stages.data import file_errors
from emu35.stages.data_inspect import load_vision
from emu35.stages.data_page import Entry, Painter, documents_page, marked
from emu35.stages.output import write_output
from emu35.tokens.serialize import Modality
from emu35.tokens.text import TextTokenizer, build_text_tokenizer
from emu35.tokens.vocabulary import vocabulary_of

_SLOW = 2000
"""Steps from which on planning again shows its progress."""

_AROUND = 12
"""Tokens shown on each side of the one that was asked for."""


@dataclass(kw_only=True, slots=True)
class TraceOptions:
    """Step ``step`` of the run in folder ``run``: all its samples in brief, or ``sample`` (counted
    from 0) with everything in it, or of that sample the document at column ``token``.

    ``html``, ``vision`` and ``table`` as for a folder.
    """

    run: Path
    step: int
    sample: int | None = None
    token: int | None = None
    html: Path | None = None
    vision: Path | None = None
    table: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedStep:
    """The rows of a step in the order of the global batch, the sources that they are from, and
    ``notes`` on what the answer rests on."""

    rows: list[Row]
    sources: list[Source]
    notes: list[str]


@file_errors()
def trace(options: TraceOptions) -> TracedStep:
    """Print which documents the step was trained on.

    Raises:
        ConfigError: options that make no sense, or a run that does not train on token shards.
        DataError: the data are not there, or are not those that the run was trained on.
    """
    config = _config(options)
    assert isinstance(config.data, TokenDataConfig)
    traced = _trace(options, config=config, data=config.data)
    for note in traced.notes:
        print(note)
    if options.sample is None:
        for number, row in enumerate(traced.rows):
            _print_row(row, sample=number, length=config.data.sequence_length)
        chosen = list(enumerate(traced.rows))
    else:
        _print_row(
            traced.rows[options.sample], sample=options.sample, length=config.data.sequence_length
        )
        chosen = [(options.sample, traced.rows[options.sample])]
    _show(options, config=config, traced=traced, chosen=chosen)
    return traced


# ---------------------------------------------------------------------------- the run


def _config(options: TraceOptions) -> RunConfig:
    """The configuration of the run, of which ``options`` ask something that it has."""
    config = read_config(options.run)
    stage, data = config.stage, config.data
    if not isinstance(stage, LMStageConfig) or not isinstance(data, TokenDataConfig):
        raise ConfigError(
            f"{options.run} is a run of stage={stage.kind} on data={data.kind}, whose steps are "
            "not made of documents of token shards; those of pretrain, sft and dida are"
        )
    problems: list[str] = []
    if not 1 <= options.step <= stage.steps:
        problems.append(f"--step {options.step}: the steps of this run are 1 to {stage.steps}")
    size = stage.global_batch_size
    if options.sample is not None and not 0 <= options.sample < size:
        problems.append(
            f"--sample {options.sample}: a step of this run has samples 0 to {size - 1}"
        )
    if options.token is not None and options.sample is None:
        problems.append("--token is a column of one sample; say which with --sample")
    if options.token is not None and not 0 <= options.token < data.sequence_length:
        problems.append(
            f"--token {options.token}: a sample of this run has columns 0 to "
            f"{data.sequence_length - 1}"
        )
    for name, source in data.sources.items():
        path = place_of(source.path)
        if isinstance(path, Url):
            continue
        if not path.is_absolute() and not path.exists():
            problems.append(
                f"data.sources.{name}.path={path} does not exist here; run this from the folder "
                "that the run was started in"
            )
    if problems:
        raise ConfigError(problems)
    return config


def _trace(options: TraceOptions, *, config: RunConfig, data: TokenDataConfig) -> TracedStep:
    plan = open_plan(
        data=data,
        vocabulary=vocabulary_of(config.tokenizer),
        seed=config.seed,
        global_batch_size=config.stage.global_batch_size,
    )
    notes: list[str] = []
    start, later = _positions(options.run / CHECKPOINTS, step=options.step, notes=notes)
    if start.state is None and later is not None:
        check_position(plan, position=later)
    steps = options.step - start.step - 1
    begin = f"from the checkpoint of step {start.step}" if start.step else "from the first step"
    notes.insert(0, f"{options.run}, step {options.step}, planned again {begin}")
    if start.state is None and later is None:
        notes.append(
            "no checkpoint says which data this run was trained on; this holds if they are the same"
        )
    reached = max((row["step"] for row in read_rows(options.run / "metrics.jsonl")), default=None)
    if reached is not None and reached < options.step:
        notes.append(f"metrics.jsonl ends at step {reached}; this is what step {options.step} gets")
    if isinstance(config.stage, DiDAConfig):
        notes.append(
            "columns are those of the documents, before stage=dida empties prompts "
            "(stage.prompt_drop) and appends noisy copies"
        )
    progress = Progress(label="planning", total=steps, items="steps")
    progress.begin(size=steps)

    def watch(done: int) -> None:
        if steps > _SLOW:
            progress.update(done, items=done)

    with contextlib.closing(progress):
        rows = rows_of_step(
            plan,
            step=options.step,
            global_batch_size=config.stage.global_batch_size,
            start=start,
            watch=watch,
        )
    return TracedStep(rows=rows, sources=[entry.source for entry in plan.sources], notes=notes)


def _positions(root: Path, *, step: int, notes: list[str]) -> tuple[Position, Position | None]:
    """The newest position before ``step`` that a checkpoint holds, and where there is none, one
    after it to compare the data with. Damaged checkpoints are passed over and noted."""
    steps = list_steps(root)
    before = [saved for saved in reversed(steps) if saved < step]
    for saved in before:
        if (state := _state(root, step=saved, notes=notes)) is not None:
            return Position(step=saved, state=state), None
    for saved in steps[len(before) :]:
        if (state := _state(root, step=saved, notes=notes)) is not None:
            return Position(), Position(step=saved, state=state)
    return Position(), None


def _state(root: Path, *, step: int, notes: list[str]) -> dict[str, Any] | None:
    folder = root / step_folder(step)
    try:
        entry = read_manifest(folder).files.get(LOADER_FILE)
    except DamagedError as error:
        notes.append(f"checkpoint {folder} is passed over: {error}")
        return None
    problem = "no data position in it"
    if entry is not None:
        problem = check_file(folder, name=LOADER_FILE, entry=entry)
    if problem is not None:
        notes.append(f"checkpoint {folder} is passed over: {problem}")
        return None
    return json.loads((folder / LOADER_FILE).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------- what is shown


def _print_row(row: Row, *, sample: int, length: int) -> None:
    count = len(row.pieces)
    print(
        f"sample {sample} (number {row.number} of the run): {row.tokens} of {length} tokens in "
        f"{count} {'document' if count == 1 else 'documents'}"
    )
    for piece in row.pieces:
        print(f"  {_place(piece)}")


def _place(piece: Piece) -> str:
    source = piece.entry.source
    index, _ = source.locate(piece.document)
    place = f"columns [{piece.left}, {piece.right})  {source.name}  {index.path}"
    if source.packed is not None:
        stored = next(one for one in source.pieces(piece.document) if one.start == piece.start)
        end = stored.first + stored.tokens
        tokens = "whole" if stored.is_whole else f"tokens [{stored.first}, {end})"
        return (
            f"{place}  {source.member(piece.document)} at {stored.start}  id {stored.id} of "
            f"{stored.source}  {tokens} of {stored.of}"
        )
    tokens = "whole" if piece.whole else f"tokens [{piece.start}, {piece.end})"
    return (
        f"{place}  {source.member(piece.document)}  id {source.record(piece.document)['id']}  "
        f"{tokens} of {int(source.length[piece.document])}"
    )


def _show(
    options: TraceOptions,
    *,
    config: RunConfig,
    traced: TracedStep,
    chosen: Sequence[tuple[int, Row]],
) -> None:
    """Texts of what was asked for, and the page."""
    if options.sample is None and options.html is None:
        return
    if options.table is not None:
        config.tokenizer.table = options.table
    tokenizer = build_text_tokenizer(config.tokenizer)
    said = None
    if options.token is not None:
        (_, row), *_ = chosen
        piece = row.piece_at(options.token)
        if piece is None:
            print(f"column {options.token} is padding: the documents end at column {row.tokens}")
            return
        said = _token(piece, column=options.token, tokenizer=tokenizer)
        chosen = [(chosen[0][0], Row(number=row.number, pieces=[piece]))]
    entries = [
        Entry(
            document=_document(piece, tokenizer=tokenizer),
            facts=[f"sample {sample}, columns [{piece.left}, {piece.right})"],
        )
        for sample, row in chosen
        for piece in row.pieces
    ]
    if options.sample is not None:
        for entry in entries:
            print(
                f"--- {entry.facts[0]}: {entry.document.source} document "
                f"{entry.document.number}  id {entry.document.id}"
            )
            print(entry.document.text())
    if said is not None:
        print(said)
    if options.html is not None:
        codec = None
        if options.vision is not None:
            codec = load_vision(options.vision, sources=traced.sources)
        page = documents_page(
            entries,
            painter=Painter(codec),
            title=f"{options.run.absolute().name}, step {options.step}",
            lead=f"{'. '.join(traced.notes)}. {len(entries)} documents.",
            above="" if said is None else marked(said),
        )
        write_output(options.html, content=page.encode("ascii"))
        print(f"written: {options.html}")


def _document(piece: Piece, *, tokenizer: TextTokenizer) -> ShownDocument:
    return show_document(
        piece.entry.source,
        number=piece.document,
        tokenizer=tokenizer,
        start=piece.start,
        end=piece.end,
    )


def _token(piece: Piece, *, column: int, tokenizer: TextTokenizer) -> str:
    """The token at a column of the row, in words."""
    source = piece.entry.source
    at = piece.start + column - piece.left
    ids, codes = source.words(piece.document)[0], source.codes(piece.document)
    before = ids[max(piece.start, at - _AROUND) : at].tolist()
    after = ids[at + 1 : min(piece.end, at + 1 + _AROUND)].tolist()
    return (
        f"column {column} is token {at} of document {piece.document} of {source.name}: id "
        f"{int(ids[at])}, {tokenizer.decode([int(ids[at])])!r}, "
        f"{Modality(int(codes[at])).name.lower()}{_inside(piece, at=at)}; before it "
        f"{tokenizer.decode(before)!r}, after it {tokenizer.decode(after)!r}"
    )


def _inside(piece: Piece, *, at: int) -> str:
    """Where in a picture a token lies."""
    images: list[list[int]] = piece.entry.source.record(piece.document)["images"]
    for number, (start, end, rows, columns) in enumerate(images):
        if start <= at < end:
            text = f", in picture {number} of {rows}x{columns} codes"
            # From the end, for how long the size before the codes is depends on the tokenizer.
            body = end - 1 - rows * (columns + 1) + 1
            place = at - body
            if place >= 0 and at < end - 1 and place % (columns + 1) < columns:
                text += f", row {place // (columns + 1)} column {place % (columns + 1)}"
            return text
    return ""
