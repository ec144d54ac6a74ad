"""Rollouts and scores of a step on disk: to look at, and to train on without an engine.

    rollouts/step_00000012/rank_00003.npz      the arrays of this rank's groups, end to end
                           rank_00003.jsonl    what they are, and everything else

The first line of the JSONL describes the pair: its version, step, rank, how many ranks wrote, and
size and SHA-256 of the arrays; then comes a line a group. Both files are written whole or not at
all, arrays first, so a pair that a killed run left unfinished is seen to be damaged, not read. What
is read equals what was written in every bit of every field.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from emu35.checkpoint.durable import file_sha256
from emu35.errors import DataError
from emu35.inference.grammar import GrammarOptions, GridSize
from emu35.inference.request import Finish
from emu35.stages.grpo.types import Behaviour, Group, Prompt, Rollout, Scores
from emu35.stages.output import unwritable, write_output
from emu35.tokens.template import Sampling

ROLLOUTS = "rollouts"
"""Folder of the archive inside a run folder."""

VERSION = 1
_KIND = "emu35 rollouts"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")

_TOKENS = {"ids": np.int32, "logprobs": np.float32, "support": np.int32, "kinds": np.uint8}
_PROMPTS = ("prompt_ids", "unconditional_ids")

_Arrays = dict[str, NDArray[Any]]


def write_groups(
    groups: Sequence[Group], *, folder: Path, step: int, rank: int = 0, ranks: int = 1
) -> Path:
    """Save what rank ``rank`` of ``ranks`` sampled for training step ``step``.

    A pair that is there already is replaced: a resumed run makes its step again.

    Returns:
        the JSONL file.

    Raises:
        DataError: the folder cannot be written.
    """
    meta, arrays = _pair(folder, step=step, rank=rank)
    try:
        meta.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(meta.parent, error) from error
    stream = io.BytesIO()
    gathered: dict[str, Any] = _gather(groups)
    np.savez_compressed(stream, **gathered)
    write_output(arrays, content=stream.getvalue())
    head = {
        "kind": _KIND,
        "version": VERSION,
        "step": step,
        "rank": rank,
        "ranks": ranks,
        "groups": len(groups),
        "bytes": stream.getbuffer().nbytes,
        "sha256": file_sha256(arrays),
    }
    lines = [json.dumps(line, allow_nan=False) for line in [head, *map(_group_line, groups)]]
    write_output(meta, content=("\n".join(lines) + "\n").encode("ascii"))
    return meta


def archived_steps(folder: Path) -> list[int]:
    """The steps that are saved below ``folder``, ascending.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder; stage.rollout.replay names the {ROLLOUTS}/ folder of a run "
            "that saved its answers (stage.rollout.save=true)"
        )
    found = [_STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def read_groups(folder: Path, *, step: int) -> list[Group]:
    """All groups of ``step``, those of rank 0 first; how many ranks read does not matter.

    Raises:
        DataError: the step, or the files of a rank, are missing, damaged, of another step or
            number of ranks, or of another version.
    """
    head, groups = _read_rank(folder, step=step, rank=0)
    for rank in range(1, head["ranks"]):
        other, more = _read_rank(folder, step=step, rank=rank)
        if other["ranks"] != head["ranks"]:
            raise DataError(
                f"{_pair(folder, step=step, rank=rank)[0]} was written by {other['ranks']} ranks, "
                f"that of rank 0 by {head['ranks']}; the step was not saved as a whole. Sample it "
                "again, or leave it out"
            )
        groups += more
    return groups


def _pair(folder: Path, *, step: int, rank: int) -> tuple[Path, Path]:
    """The JSONL and the array file of a rank."""
    stem = folder / f"step_{step:08d}" / f"rank_{rank:05d}"
    return stem.with_suffix(".jsonl"), stem.with_suffix(".npz")


# ---------------------------------------------------------------------------- writing


def _gather(groups: Sequence[Group]) -> _Arrays:
    """Arrays of all rollouts end to end; the lines of the groups tell their lengths."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    references = [codes for group in groups for codes in group.prompt.references]
    arrays: _Arrays = {
        name: _joined([getattr(rollout, name) for rollout in rollouts], dtype=dtype)
        for name, dtype in {**dict.fromkeys(_PROMPTS, np.int32), **_TOKENS}.items()
    }
    kept = [candidates for rollout in rollouts for candidates in rollout.candidates]
    counts = [-1 if candidates is None else len(candidates) for candidates in kept]
    arrays["candidate_counts"] = np.array(counts, np.int32)
    candidates_K = _joined([ids for ids in kept if ids is not None], dtype=np.int32)
    # Ascending ids lie close together: their differences take a fraction of the room.
    arrays["candidates"] = np.diff(candidates_K, prepend=np.int32(0))
    arrays["references"] = _joined([codes.ravel() for codes in references], dtype=np.int64)
    return arrays


def _joined(parts: Sequence[NDArray[Any]], *, dtype: type[np.generic]) -> NDArray[Any]:
    assert dtype is np.int64 or all(part.dtype == dtype for part in parts), "Rollout says which"
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])


def _group_line(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "serial": group.serial,
        "prompt": {
            "task": prompt.task,
            "number": prompt.number,
            "id": prompt.id,
            "record": dict(prompt.record),
            "references": [
                {"shape": codes.shape, "dtype": codes.dtype.str} for codes in prompt.references
            ],
        },
        "rollouts": [_rollout_line(rollout) for rollout in group.rollouts],
        "scores": [
            {
                "raw": dict(scores.raw),
                "mapped": dict(scores.mapped),
                "clamped": sorted(scores.clamped),
                "unscored": dict(scores.unscored),
                "total": scores.total,
                "lacking": scores.lacking,
            }
            for scores in group.scores
        ],
    }


def _rollout_line(rollout: Rollout) -> dict[str, Any]:
    return {
        "seed": rollout.seed,
        "step": rollout.step,
        "finish": rollout.finish.value,
        "behaviour": asdict(rollout.behaviour),
        "tokens": len(rollout.ids),
        "candidates": len(rollout.candidates),
        **{name: len(getattr(rollout, name)) for name in _PROMPTS},
    }


# ---------------------------------------------------------------------------- reading


def _read_rank(folder: Path, *, step: int, rank: int) -> tuple[dict[str, Any], list[Group]]:
    meta, path = _pair(folder, step=step, rank=rank)
    try:
        lines = meta.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        steps = ", ".join(map(str, archived_steps(folder)[:20])) or "none"
        raise DataError(
            f"cannot read {meta}: {error}; the steps saved in {folder} are: {steps}"
        ) from error
    try:
        head, *rest = map(json.loads, lines)
        _check_head(head, step=step, rank=rank)
        if head["groups"] != len(rest):
            raise ValueError(f"{len(rest)} groups instead of {head['groups']}")
        if (path.stat().st_size, file_sha256(path)) != (head["bytes"], head["sha256"]):
            raise ValueError(f"{path.name} is not what was written with it")
        with np.load(path, allow_pickle=False) as arrays:
            return head, _scatter(rest, arrays=dict(arrays))
    except (OSError, BadZipFile, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{meta} is damaged or unfinished: {what}; sample step {step} again "
            "(stage.rollout.save=true), or leave it out"
        ) from error


def _check_head(head: Any, *, step: int, rank: int) -> None:
    if not isinstance(head, dict) or head.get("kind") != _KIND:
        raise ValueError("it does not begin with a line that describes rollouts")
    if head["version"] != VERSION:
        raise ValueError(f"version {head['version']}, this emu35 reads {VERSION}")
    if (head["step"], head["rank"]) != (step, rank):
        raise ValueError(f"it holds rank {head['rank']} of step {head['step']}")


class _Reader:
    """Takes arrays apart in the order in which they were joined."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._arrays, self._at = arrays, dict.fromkeys(arrays, 0)

    def take(self, name: str, length: int) -> NDArray[Any]:
        start = self._at[name]
        part = self._arrays[name][start : start + length]
        if len(part) != length:
            raise ValueError(f"{name} ends after {len(self._arrays[name])} numbers")
        self._at[name] += length
        return part

    def check_end(self) -> None:
        for name, array in self._arrays.items():
            if self._at[name] != len(array):
                raise ValueError(f"{name} has {len(array) - self._at[name]} numbers too many")


def _scatter(lines: Sequence[Mapping[str, Any]], *, arrays: _Arrays) -> list[Group]:
    arrays["candidates"] = np.cumsum(arrays["candidates"], dtype=np.int32)
    reader = _Reader(arrays)
    groups = [
        Group(
            serial=line["serial"],
            prompt=_prompt(line["prompt"], take=reader.take),
            rollouts=tuple(_rollout(each, take=reader.take) for each in line["rollouts"]),
            scores=tuple(_scores(each) for each in line["scores"]),
        )
        for line in lines
    ]
    reader.check_end()
    return groups


_Take = Callable[[str, int], NDArray[Any]]


def _prompt(line: Mapping[str, Any], *, take: _Take) -> Prompt:
    references = tuple(
        take("references", int(np.prod(each["shape"], dtype=np.int64)))
        .astype(each["dtype"])
        .reshape(each["shape"])
        for each in line["references"]
    )
    return Prompt(**{**line, "references": references})


def _rollout(line: Mapping[str, Any], *, take: _Take) -> Rollout:
    counts_T = take("candidate_counts", line["candidates"])
    behaviour = line["behaviour"]
    grammar = behaviour["grammar"]
    size = grammar["size"]
    return Rollout(
        **{name: take(name, line[name]) for name in _PROMPTS},
        **{name: take(name, line["tokens"]) for name in _TOKENS},
        behaviour=Behaviour(
            **{
                **behaviour,
                "text": Sampling(**behaviour["text"]),
                "visual": Sampling(**behaviour["visual"]),
                "grammar": GrammarOptions(
                    **{**grammar, "size": None if size is None else GridSize(**size)}
                ),
            }
        ),
        seed=line["seed"],
        step=line["step"],
        finish=Finish(line["finish"]),
        candidates=tuple(
            None if count < 0 else take("candidates", count) for count in counts_T.tolist()
        ),
    )


def _scores(line: Mapping[str, Any]) -> Scores:
    return Scores(**{**line, "clamped": frozenset(line["clamped"])})
