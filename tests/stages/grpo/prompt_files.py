"""Files of prompts, and a reward that wants something of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emu35.config.prompts import PromptTaskConfig
from emu35.stages.grpo.prompts import TaskPrompt, read_tasks


class Wants:
    """A reward that needs a key of the record."""

    def __init__(self, key: str) -> None:
        self.key = key

    def problems(self, record: Mapping[str, Any]) -> list[str]:
        return [] if self.key in record else [f"it needs {self.key}"]


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(folder: Path, sizes: Mapping[str, int]) -> dict[str, list[TaskPrompt]]:
    """So many prompts of each task."""
    tasks: dict[str, PromptTaskConfig] = {}
    for name, size in sizes.items():
        records = [{"prompt": f"{name} {number}"} for number in range(size)]
        tasks[name] = PromptTaskConfig(path=str(write(folder / f"{name}.jsonl", records)))
    return read_tasks(tasks, rewards={})
