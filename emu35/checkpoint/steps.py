"""What the checkpoints of a run are called; light, for whoever only looks for them."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run folder."""

STEP_NAME = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Name of the folder of ``step``."""
    return f"step_{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder in ``root``, ascending, valid or not."""
    if not root.is_dir():
        return []
    matches = (STEP_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)
