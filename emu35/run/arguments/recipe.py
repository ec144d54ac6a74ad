"""What an experiment says about ingesting one of its sources."""

from dataclasses import dataclass, field
from pathlib import Path

from emu35.config.data import TokenDataConfig
from emu35.config.schema import did_you_mean
from emu35.config.tokenizer import TokenizerConfig
from emu35.data.place import is_url
from emu35.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Options of an ingestion that need not be given; those that are None have no say.

    ``source`` is the name of the shards, ``out`` their folder, ``area`` as in ``--area``; ``title``
    names experiment and source, where the options come from one.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    source: str | None = None
    out: Path | None = None
    area: str | None = None
    sequence_length: int = 0
    title: str | None = None


def read_recipe(experiment: str, *, source: str | None, configs: Path | None) -> Recipe:
    """How ``experiment`` wants its ``source`` ingested.

    ``source`` is the name of a source or, where there is none of that name, of a validation set;
    ``sources.NAME`` and ``validation.NAME`` tell two of one name apart. ``configs`` is a folder of
    more experiments.

    Raises:
        ConfigError: if the experiment does not compose, reads no token shards, or has no such
            source.
    """
    from emu35.run.compose import compose

    config = compose([f"experiment={experiment}"], configs=configs)
    data = config.data
    if not isinstance(data, TokenDataConfig):
        raise ConfigError(
            f"experiment {experiment} reads no token shards (data.kind is {data.kind!r}); "
            "name one that does with --recipe"
        )
    kind, name = _find(data, source, experiment=experiment)
    section = data.sources[name] if kind == "sources" else data.validation[name]
    return Recipe(
        tokenizer=config.tokenizer,
        source=name,
        # Shards are written here and uploaded; what is read from a URL needs an --out of its own.
        out=None if is_url(section.path) else Path(section.path),
        area=section.area,
        sequence_length=data.sequence_length,
        title=f"recipe {experiment}, {kind}.{name}",
    )


def _find(data: TokenDataConfig, source: str | None, *, experiment: str) -> tuple[str, str]:
    """Section and name of the source. Raises: ConfigError if there is none."""
    every = {"sources": [*data.sources], "validation": [*data.validation]}
    has = "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in every.items())
    if source is None:
        raise ConfigError(
            f"--recipe {experiment} needs --source, the name of what is ingested; it has {has}"
        )
    kind, dot, name = source.partition(".")
    wanted = [(kind, name)] if dot and kind in every else [(kind, source) for kind in every]
    for kind, name in wanted:
        if name in every[kind]:
            return kind, name
    hint = did_you_mean(source, {name for names in every.values() for name in names})
    raise ConfigError(f"--source {source} is no source of {experiment}; it has {has}.{hint}")
