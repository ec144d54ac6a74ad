"""What the settings that rows depend on are called where they were given."""

from dataclasses import dataclass

from emu35.config.data import Overlong


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSettings:
    """The names of ``data.sequence_length`` and ``data.overlong``, and what joins a name and its
    value."""

    length: str
    overlong: str
    joint: str

    def length_is(self, value: int) -> str:
        return f"{self.length}{self.joint}{value}"

    def overlong_is(self, value: Overlong) -> str:
        return f"{self.overlong}{self.joint}{value}"


CONFIG = RowSettings(length="data.sequence_length", overlong="data.overlong", joint="=")
OPTIONS = RowSettings(length="--sequence-length", overlong="--overlong", joint=" ")
