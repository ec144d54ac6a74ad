"""``emu35 data validate``: read folders of shards whole, and name everything that is wrong."""

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emu35.data.ingest.progress import Progress
from emu35.data.place import Url, place_of
from emu35.data.validate.folder import (
    FolderReport,
    Found,
    Tokenizers,
    shards_of,
    validate_folder,
)
from emu35.data.validate.problem import Problem
from emu35.errors import ConfigError, DataError
from emu35.files import atomic_file
from emu35.stages.data import file_errors

_LISTED = 20
"""Problems on the terminal; a report has all."""


@dataclass(kw_only=True, slots=True)
class ValidateOptions:
    """``report`` is a JSON-lines file that gets every problem, ``threads`` how many shards are
    read at a time, ``table`` the file of the emu35 tokenizer where the cache has none."""

    folders: Sequence[str | Path]
    report: Path | None = None
    threads: int = 2
    table: str | None = None


@file_errors()
def validate(options: ValidateOptions) -> None:
    """Read everything; print a summary of each folder, and up to twenty problems.

    Raises:
        ConfigError: options that make no sense.
        DataError: something is wrong with the shards, and how much.
    """
    if options.threads < 1:
        raise ConfigError(f"--threads {options.threads} must be at least 1")
    if options.report is not None and not options.report.absolute().parent.is_dir():
        raise ConfigError(f"--report {options.report}: its folder does not exist; make it first")
    places = list(dict.fromkeys(map(place_of, options.folders)))
    if urls := [str(place) for place in places if isinstance(place, Url)]:
        raise ConfigError(
            f"{', '.join(urls)}: validate reads local folders; copy the shards here, or compare "
            "them with their indices by `emu35 data index URL --verify`"
        )
    folders = shards_of([place for place in places if isinstance(place, Path)])
    tokenizers = Tokenizers(table=options.table)
    shards = [shard for found in folders.values() if isinstance(found, list) for shard in found]
    total = sum(shard.stat().st_size for shard in shards if shard.is_file())
    progress = Progress(label="validating", total=total, items="documents")
    reports: list[FolderReport] = []
    listed: list[Problem] = []
    with _writing(options.report) as write, contextlib.closing(progress):
        for path, held in folders.items():
            for found in validate_folder(
                path, held, tokenizers=tokenizers, threads=options.threads
            ):
                _advance(progress, found)
                for problem in found.problems:
                    write(problem)
                listed += found.problems[: _LISTED - len(listed)]
                if found.last:
                    reports.append(found.report)
    for report in reports:
        print("\n".join(_summary(report)))
    if tokenizers.missing:
        print(f"not checked: how sizes of pictures are spelled, for {tokenizers.missing}")
    _conclude(options, reports=reports, listed=listed)


def _advance(progress: Progress, found: Found) -> None:
    progress.begin(size=found.bytes)
    progress.update(found.bytes, items=found.documents)


@contextlib.contextmanager
def _writing(report: Path | None) -> Generator[Callable[[Problem], object]]:
    """What problems are given to; the file appears whole, when all is read."""
    if report is None:
        yield lambda problem: None
        return
    with atomic_file(report) as file:
        yield lambda problem: file.write(json.dumps(problem.to_json()).encode() + b"\n")


def _summary(report: FolderReport) -> list[str]:
    state = "all sound"
    if report.problems:
        state = f"{report.problems} problems in {report.damaged} shards"
    if not report.shards:
        state = "nothing could be read"
    lines = [
        f"{report.path}: {report.shards} shards, {report.documents} documents, "
        f"{report.pictures} pictures, {report.tokens} tokens, {report.bytes} bytes: {state}"
    ]
    duplicates = report.duplicates()
    if duplicates is not None:
        lines.append(
            f"  warning: {duplicates.documents} documents have the id of another; the first: "
            f"{duplicates.second} that of {duplicates.first}"
        )
    return lines


def _conclude(
    options: ValidateOptions, *, reports: list[FolderReport], listed: list[Problem]
) -> None:
    problems = sum(report.problems for report in reports)
    if not problems:
        return
    for problem in listed:
        print(f"  - {problem}")
    more = problems - len(listed)
    if more:
        print(f"  ... and {more} more")
    sys.stdout.flush()
    damaged = sum(report.damaged for report in reports)
    shards = sum(report.shards for report in reports)
    where = (
        f"all of them are in {options.report}"
        if options.report
        else ("name a file with --report to have all of them")
    )
    raise DataError(
        f"{problems} problems, in {damaged} of {shards} shards; {where}. Restore damaged shards "
        "from a copy, or ingest their inputs again"
    )
