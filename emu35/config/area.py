"""How large pictures become before they are tokenized."""

import re
from dataclasses import dataclass

from emu35.errors import ConfigError

_SIZE = r"(\d+)(?:[x*](\d+))?"
_RANGE = re.compile(rf"(?:{_SIZE})?(\.\.)?(?:{_SIZE})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """Pictures keep their aspect, and their own area where it lies in [``least``, ``most``] pixels;
    others are scaled to the nearer end. ``least == most`` gives all the same area."""

    least: int
    most: int

    def of(self, *, width: int, height: int) -> int:
        """Pixels that a picture of ``width`` x ``height`` is to have."""
        return min(max(width * height, self.least), self.most)


def parse_area(text: str) -> Area:
    """``512x512`` or ``262144``: that area. ``512x512..1024x1024``: between the two.
    ``..512x512``: at most that.

    Raises:
        ConfigError: if it is none of these.
    """
    match = _RANGE.fullmatch(text.strip())
    least, most = (_pixels(match[1], match[2]), _pixels(match[4], match[5])) if match else (0, 0)
    if match and not match[3]:
        # Without dots there is one size, and the pattern takes it for the first.
        most = least
    elif match and match[3] and not match[1]:
        least = 1
    if not match or not 0 < least <= most:
        raise ConfigError(
            f"area {text!r} is no area; write pixels or WIDTHxHEIGHT such as 512x512, a range such "
            "as 512x512..1024x1024, or an upper bound such as ..512x512"
        )
    return Area(least=least, most=most)


def _pixels(width: str | None, height: str | None) -> int:
    return int(width) * int(height or 1) if width else 0
