"""What stages that only measure have in common: they train nothing."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from emu35.config.stage import StageConfig

TRAINING: Mapping[str, int] = MappingProxyType(
    {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "validate_every": 0}
)
"""Fields that every stage has and an evaluation does not read, with the values they rest at."""


def training_problems(stage: StageConfig, *, remedies: Mapping[str, str]) -> Iterator[str]:
    """A problem for each such field that was given; ``remedies`` name what is to be given instead,
    by field."""
    for name, rest in TRAINING.items():
        if (value := getattr(stage, name)) != rest:
            remedy = f" ({remedies[name]})" if name in remedies else ""
            yield (
                f"stage.{name}={value} is about training, and stage={stage.kind} trains nothing; "
                f"leave it out{remedy}"
            )
