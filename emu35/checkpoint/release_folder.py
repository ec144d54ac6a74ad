"""What lies in a release folder, and ``emu35.json``, which says so.

::

    REL/config.json                       architecture, official fields
        generation_config.json
        model-00001-of-00015.safetensors  weights under official names (or model.safetensors)
        model.safetensors.index.json
        text_tokenizer/...                see emu35.tokens.release_files
        vision_tokenizer/config.yaml      image tokenizer, where the run has one
        vision_tokenizer/model.ckpt
        dida_adapter/...                  see emu35.checkpoint.dida_adapter, where the run has them
        emu35.json                        what the official code has no place for

``emu35.json`` records the kind of tokenizer, the form of prompts the model was trained with, where
it comes from, the versions that wrote it, and size and SHA-256 of every other file. Official
releases have none; they are read all the same, with nothing to compare hashes with.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emu35.checkpoint.durable import files_below, folders_below, is_inside
from emu35.checkpoint.hf_config import read_json
from emu35.checkpoint.manifest import FileEntry, check_file, current_versions, describe_file
from emu35.config import PathConfig, PathKind, TokenizerConfig, TokenizerKind
from emu35.errors import ReleaseError
from emu35.files import sync_folder
from emu35.tokens.template import PromptTemplate
from emu35.vision.ibq.folder import (
    ORIGIN,
    Layout,
    ibq_digest,
    layout_of,
    read_folder,
    write_folder,
)
from emu35.vision.plugged import is_plugged

FACTS = "emu35.json"
TEXT_FOLDER = "text_tokenizer"
VISION_FOLDER = "vision_tokenizer"
VISION_FILES = ("config.yaml", "model.ckpt")
FORMAT = 1


@dataclass(kw_only=True, slots=True)
class ReleaseFacts:
    """The contents of ``emu35.json``. ``noise`` is the path from noise to pictures that the model
    was adapted to, None where it was not, or adapters of their own hold it; ``origin`` the run's
    name and step."""

    tokenizer: TokenizerConfig
    template: PromptTemplate
    parameters: int
    noise: PathConfig | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=current_versions)
    files: dict[str, FileEntry] = field(default_factory=dict)


def write_json(content: Mapping[str, Any], *, path: Path) -> None:
    """Write a JSON object; keys keep their order."""
    path.write_bytes((json.dumps(content, indent=2) + "\n").encode("ascii"))


def write_facts(facts: ReleaseFacts, *, folder: Path) -> None:
    """Hash and sync every file of a finished folder, then write its ``emu35.json``, synced."""
    for name in files_below(folder):
        if name != FACTS:
            facts.files[name] = describe_file(folder, name=name)
    content = {
        "format": FORMAT,
        "tokenizer": {
            "kind": facts.tokenizer.kind.value,
            "codebook_size": facts.tokenizer.codebook_size,
        },
        "prompt_template": facts.template.value,
        "parameters": facts.parameters,
        **({"noise": asdict(facts.noise)} if facts.noise else {}),
        "origin": facts.origin,
        "versions": facts.versions,
        "files": {name: asdict(entry) for name, entry in sorted(facts.files.items())},
    }
    write_json(content, path=folder / FACTS)
    with (folder / FACTS).open("rb") as file:
        os.fsync(file.fileno())
    for path in folders_below(folder):
        sync_folder(path)


def read_facts(folder: Path) -> ReleaseFacts | None:
    """Read ``emu35.json``; None where there is none (an official release).

    Raises:
        ReleaseError: it is damaged, of another format, or names a path outside the folder.
    """
    path = folder / FACTS
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ReleaseError(f"{path} has format {content.get('format')!r}, not {FORMAT}")
    try:
        tokenizer = TokenizerConfig(
            kind=TokenizerKind(content["tokenizer"]["kind"]),
            codebook_size=int(content["tokenizer"]["codebook_size"]),
        )
        files = {
            str(name): FileEntry(size=int(entry["size"]), sha256=str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
        facts = ReleaseFacts(
            tokenizer=tokenizer,
            template=PromptTemplate(content["prompt_template"]),
            parameters=int(content["parameters"]),
            noise=read_noise(content.get("noise")),
            origin=dict(content["origin"]),
            versions={str(name): str(text) for name, text in content["versions"].items()},
            files=files,
        )
        if facts.noise and (problems := list(facts.noise.problems())):
            raise ValueError("; ".join(problems))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReleaseError(f"{path} lacks a field or has a wrong one: {error!r}") from None
    for name in facts.files:
        if not is_inside(name):
            raise ReleaseError(f"{path} names {name!r}, which is not a path inside the folder")
    return facts


def read_noise(content: Mapping[str, Any] | None) -> PathConfig | None:
    """A path as ``asdict`` wrote it; None where none is kept.

    Raises:
        KeyError, TypeError, ValueError: it lacks a field or has a wrong one.
    """
    if content is None:
        return None
    return PathConfig(
        kind=PathKind(content["kind"]), c=float(content["c"]), alpha=float(content["alpha"])
    )


def damaged_files(folder: Path, *, facts: ReleaseFacts) -> list[str]:
    """Everything that differs between a folder and its ``emu35.json``, one line each."""
    checks = (check_file(folder, name=name, entry=entry) for name, entry in facts.files.items())
    problems = [problem for problem in checks if problem]
    unlisted = set(files_below(folder)) - facts.files.keys() - {FACTS}
    return problems + [f"{name} is not listed in {FACTS}" for name in sorted(unlisted)]


def copy_vision_tokenizer(source: Path, *, folder: Path) -> None:
    """The image tokenizer in ``source`` as ``folder``/vision_tokenizer, in the official layout; one
    of another package as it is.

    Raises:
        ReleaseError: ``source`` is not the folder of an image tokenizer.
    """
    target = folder / VISION_FOLDER
    if is_plugged(source):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
        return
    if layout_of(source) is Layout.hf:
        write_folder(read_folder(source), folder=target, digest=ibq_digest(source))
        return
    for name in VISION_FILES:
        if not (source / name).is_file():
            raise ReleaseError(
                f"{source} is no image tokenizer: {name} is missing; "
                "point tokenizer.vision at a folder with config.yaml and model.ckpt"
            )
    target.mkdir()
    noted = (ORIGIN,) if (source / ORIGIN).is_file() else ()
    for name in (*VISION_FILES, *noted):
        shutil.copyfile(source / name, target / name)
