"""One family of errors for everything a user can get wrong.

Every message names the offending value, the rule it breaks and the remedy. The command line prints
such an error as plain text and exits with its ``exit_code``; anything outside this family is a bug
of emu35 and keeps its traceback.
"""

from collections.abc import Sequence


class Emu35Error(Exception):
    """Base of every error that a user, rather than a programmer, can mend."""

    exit_code = 2


class ConfigError(Emu35Error):
    """One or several problems in a configuration, reported together."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            text = f"{len(self.problems)} problems in the configuration:\n{lines}"
        super().__init__(text)


class DataError(Emu35Error):
    """A shard, an index or an input file is not what it should be."""


class TokenizerError(Emu35Error):
    """The text table is missing or differs, or an id lies outside the vocabulary."""


class CheckpointError(Emu35Error):
    """A checkpoint is damaged, incomplete, or belongs to another configuration."""


class ReleaseError(Emu35Error):
    """A release folder cannot be written, read or verified."""


class LaunchError(Emu35Error):
    """Processes could not be started, or one of them failed."""


class QueueFull(Emu35Error):
    """As many requests wait for the engine as may; later there will be room again."""


class Interrupted(Emu35Error):
    """The run was asked to stop and saved itself; the same command resumes it."""

    exit_code = 75
