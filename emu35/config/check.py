"""The few sentences that every section's ``problems()`` is made of."""

import math
from collections.abc import Iterator


def at_least(section: str, lowest: float, **values: float) -> Iterator[str]:
    """Yield a problem for each keyword whose value lies below ``lowest``."""
    for name, value in values.items():
        if not value >= lowest:  # no number is not enough either
            yield f"{section}.{name}={value} is too small; use at least {lowest}"
        elif value == math.inf:
            yield f"{section}.{name}={value} must be finite"


def fraction(section: str, **values: float) -> Iterator[str]:
    """Yield a problem for each keyword whose value lies outside [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            yield f"{section}.{name}={value} must lie in [0, 1)"


def seeds(section: str, **values: int) -> Iterator[str]:
    """Yield a problem for each keyword that some random generator does not accept."""
    for name, value in values.items():
        if not 0 <= value < 2**32:
            where = f"{section}.{name}" if section else name
            yield f"{where}={value} must lie in 0..{2**32 - 1}, what every generator accepts"


def divisors(number: int, limit: int = 4096) -> list[int]:
    """All divisors of ``number`` up to ``limit``, ascending: the remedy for a bad layout."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]
