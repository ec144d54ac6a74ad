"""What the ranks of a node tell the launcher that supervises their torchrun.

torchrun knows two ends of a rank, 0 and failure: it answers 1 for every other exit code, and where
restarts are left it starts all ranks again. A rank that was stopped and saved must not be started
again, so it ends with 0, and writes its real exit code into a folder that the launcher made for
this one purpose (on the node's own disk, gone when the launcher ends). A rank that is killed
writes nothing, which is told apart as well.
"""

import os
from dataclasses import dataclass
from pathlib import Path

FOLDER = "EMU35_OUTCOMES"
"""Environment variable that names the folder."""

_RUNNING = "running"


@dataclass(kw_only=True, slots=True, frozen=True)
class Outcome:
    """How rank ``rank`` ended; ``code`` is None if it runs or was killed."""

    rank: int
    code: int | None


def report(code: int | None) -> None:
    """Note the exit code of this rank, or (None) that it runs."""
    folder, local_rank = os.environ[FOLDER], os.environ["LOCAL_RANK"]
    text = f"{os.environ['RANK']} {_RUNNING if code is None else code}\n"
    (Path(folder) / f"local_rank{local_rank}").write_text(text, encoding="ascii")


def reported(folder: Path | str) -> list[Outcome]:
    """What the ranks of this node have noted so far, by rank; of several attempts the last."""
    outcomes: list[Outcome] = []
    for file in Path(folder).glob("local_rank*"):
        rank, _, code = file.read_text(encoding="ascii").strip().partition(" ")
        if rank and code:  # else it is being written
            outcomes.append(Outcome(rank=int(rank), code=None if code == _RUNNING else int(code)))
    return sorted(outcomes, key=lambda outcome: outcome.rank)
