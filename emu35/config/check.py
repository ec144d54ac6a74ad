"""The few sentences that every section's ``problems()`` is made of."""

from collections.abc import Iterator


def at_least(section: str, lowest: float, **values: float) -> Iterator[str]:
    """Yield a problem for each keyword whose value lies below ``lowest``."""
    for name, value in values.items():
        if not value >= lowest:  # no number is not enough either
            yield f"{section}.{name}={value} is too small; use at least {lowest}"


def fraction(section: str, **values: float) -> Iterator[str]:
    """Yield a problem for each keyword whose value lies outside [0, 1)."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            yield f"{section}.{name}={value} must lie in [0, 1)"


def divisors(number: int, limit: int = 4096) -> list[int]:
    """All divisors of ``number`` up to ``limit``, ascending: the remedy for a bad layout."""
    return [d for d in range(1, min(number, limit) + 1) if number % d == 0]
