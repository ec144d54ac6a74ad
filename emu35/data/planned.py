"""What a plan is made of, and what of it may not change while a run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from emu35.config.data import Packing
from emu35.data.pack import PackedRows

Ints = npt.NDArray[np.int64]

STATE_VERSION = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """What the plan knows of a source: its share, the lengths of its items, and how it is packed.

    Attributes:
        ratio, schedule: its share, and the shares it has from some steps on.
        length: [N] tokens of the items in shard order; ``per_shard`` counts those of each shard.
        document: [N] what document an item is a piece of, ascending; None: each is a document.
        epochs, max_tokens: its end; None: it has none.
        filter: by what its documents were chosen, in words.
        left_out: names of damaged shards, which are no part of ``fingerprint``.
        rows: those of a source that lies packed; its ``packing`` is offline.
    """

    name: str
    ratio: float
    length: Ints
    per_shard: Ints
    fingerprint: str
    left_out: tuple[str, ...] = ()
    packing: Packing = Packing.online
    document: Ints | None = None
    schedule: Mapping[int, float] = field(default_factory=dict[int, float])
    epochs: float | None = None
    max_tokens: int | None = None
    filter: str = "none"
    rows: PackedRows | None = None

    def settings(self) -> dict[str, Any]:
        """What of it decides the stream beside its shards, JSON-able."""
        return {
            "packing": self.packing.value,
            "ratio": self.ratio,
            "schedule": [[step, ratio] for step, ratio in sorted(self.schedule.items())],
            "epochs": self.epochs,
            "max_tokens": self.max_tokens,
            "filter": self.filter,
        }


_SETTINGS = {"schedule", "samples_per_step"}
"""Settings that count only where a source has a schedule."""


def changes_since(
    state: Mapping[str, Any], *, identity: Mapping[str, Any], sources: Sequence[PlannedSource]
) -> list[str]:
    """What differs from when a planner saved ``state``, a clause each: its settings (``identity``)
    and its ``sources``."""
    if state.get("version") != STATE_VERSION:
        return [
            f"the position is of version {state.get('version')}, from before documents were "
            f"shuffled whole, and this emu35 continues version {STATE_VERSION}"
        ]
    changes: list[str] = []
    for name in sorted(identity.keys() | _SETTINGS & state.keys()):
        before, now = state.get(name), identity.get(name)
        if before != now:
            changes.append(f"{name} was {before} and is {now}")
    saved: Mapping[str, Any] = state.get("sources", {})
    names = [source.name for source in sources]
    if sorted(saved) != names:
        changes.append(f"sources were {sorted(saved)} and are {names}")
    for source in sources:
        entry = saved.get(source.name)
        if entry is None:
            continue
        if entry["fingerprint"] != source.fingerprint:
            changes.append(
                f"shards of source {source.name!r} changed ({entry['items']} pieces then, "
                f"{len(source.length)} now{_other_shards(entry, source=source)})"
            )
        for name, value in source.settings().items():
            if entry[name] != value:
                changes.append(f"{name} of source {source.name!r} was {entry[name]} and is {value}")
    return changes


def _other_shards(entry: Mapping[str, Any], *, source: PlannedSource) -> str:
    """What became of shards that were or are left out, for the end of a sentence."""
    before, now = set[str](entry.get("left_out", ())), set(source.left_out)
    parts: list[str] = []
    if now - before:
        parts.append("damaged since and left out: " + ", ".join(sorted(now - before)))
    if before - now:
        parts.append("left out then and not now: " + ", ".join(sorted(before - now)))
    return "".join(f"; {part}" for part in parts)
