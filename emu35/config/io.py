"""A configuration as a plain YAML file: written by the launching host, read by every rank.

The file holds every field, resolved, so that a rank needs neither Hydra nor the ``configs`` folder
and a run can be understood years later from its folder alone.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from emu35.config.root import KINDS, RunConfig
from emu35.config.schema import Misfits, Plain, build, is_mapping, to_plain, with_defaults
from emu35.errors import ConfigError
from emu35.files import write_atomically

CONFIG_FILE = "config.yaml"
"""Name of the configuration inside a run folder."""

MAY_CHANGE = (
    "name",
    "run_dir",
    "deterministic",
    "log.*",
    "checkpoint.*",
    "guard.*",
    "launch.*",
    "parallel.tp",
    "parallel.sp",
    "parallel.pp",
    "parallel.vpp",
    "parallel.cp",
    "parallel.cp_comm_type",
    "parallel.pp_layers",
    "engine.layers",
    "engine.recompute*",
    "engine.overlap_*",
    "parallel.zero1",
    "model.attention_backend",
    "data.prefetch_steps",
    "data.damaged",
    "data.cache.*",
    # Where it changes the order of pictures, the checkpoint refuses it.
    "data.bucket_group",
    "data.score_cache",
    "data.decode_threads",
    "data.scorers.*.device",
    "data.sources.*.area",
    "data.validation.*.area",
    "stage.micro_batch_size",
    "stage.loss_chunk",
    "stage.samplers",
    "stage.denoise_steps",
    "stage.ar_seeds",
    "stage.times",
    "stage.features",
    "stage.shown",
    "stage.pages_every",
    "stage.pages_groups",
    "stage.unscored",
    "stage.max_unscored",
    "stage.rollout.batch_size",
    "stage.rollout.cache_tokens",
    "stage.rollout.bucket_bytes",
    "stage.rollout.servers",
    "stage.rollout.timeout",
    "stage.rollout.save",
    "stage.rewards.*.concurrency",
    "stage.rewards.*.timeout",
    "stage.rewards.*.retries",
    "stage.rewards.*.backoff",
    "stage.rewards.*.base_url",
    "stage.rewards.*.api_key_env",
    "stage.rewards.*.device",
)
"""Keys (patterns) that a resumed run may change: where it runs and how something is computed.

What is computed may not change, though more of an evaluation may be asked for. ``stage.steps`` is
absent on purpose: the cosine schedule depends on it, so other steps are another run. The trainer
holds checkpoints to the same rule.
"""


def read_config(path: Path | str) -> RunConfig:
    """Read ``path``: a ``config.yaml``, or a run folder that contains one.

    Raises:
        ConfigError: the file is missing, is no YAML, or does not fit (every misfit is named).
    """
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
    tree = _load_yaml(file)
    misfits: Misfits = {}
    config = build(resolve(with_defaults(tree), misfits=misfits), misfits=misfits)
    if config is None:
        raise ConfigError([f"{file}: {message}" for message in misfits.values()])
    return config


def write_config(config: RunConfig, path: Path | str) -> None:
    """Write ``config`` to ``path`` (a file, or a run folder) atomically."""
    target = Path(path)
    if target.is_dir():
        target = target / CONFIG_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content=to_yaml(to_plain(config)).encode())


def to_yaml(tree: Plain) -> str:
    """YAML text of plain values, keys in their order."""
    # Only OmegaConf's dumper quotes the words (1e3, for one) that its loader would read as numbers.
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(tree))


def resolve(tree: Mapping[str, Plain], *, misfits: Misfits) -> dict[str, Plain]:
    """``tree`` with every ``${key}`` replaced by what it refers to; failures go to ``misfits``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(dict(tree))
    failed: list[str] = []
    for key, value in flatten(tree).items():
        if "${" not in str(value):
            continue
        try:
            OmegaConf.to_container(OmegaConf.create([OmegaConf.select(config, key)]), resolve=True)
        except OmegaConfBaseException as error:
            misfits[key] = f"{key}={value!r}: {str(error).splitlines()[0]}"
            failed.append(key)
    for key in failed:
        OmegaConf.update(config, key, None)
    plain = OmegaConf.to_container(config, resolve=True)
    assert is_mapping(plain)
    return dict(plain)


def config_diff(a: RunConfig, b: RunConfig) -> list[str]:
    """One line for each key that differs: ``stage.steps: 100 -> 200`` (``-`` where absent)."""
    return _differences(flatten(to_plain(a)), flatten(to_plain(b)))


def departures(config: RunConfig) -> list[str]:
    """What departs from the defaults of the chosen kinds, in the form of :func:`config_diff`."""
    plain = to_plain(config)
    kinds = {section: {"kind": plain[section]["kind"]} for section in KINDS}
    defaults = resolve(with_defaults({"name": config.name, **kinds}), misfits={})
    return _differences(flatten(defaults | {"name": RunConfig().name}), flatten(plain))


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value at the dotted ``key``."""
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def run_identity(config: RunConfig) -> dict[str, Plain]:
    """The flat key -> value pairs that make two runs the same run; JSON-ready."""
    return {key: value for key, value in flatten(to_plain(config)).items() if not may_change(key)}


def complete_identity(
    saved: Mapping[str, Plain], *, wanted: Mapping[str, Plain]
) -> dict[str, Plain]:
    """``saved``, a :func:`run_identity` written when the schema had fewer fields, with the defaults
    of those fields of ``wanted`` that it lacks. A field that did not exist decided nothing, and its
    default is what the run did without it. Unchanged where ``saved`` does not fit the schema.
    """
    lacking = wanted.keys() - saved.keys()
    if not lacking:
        return dict(saved)
    misfits: Misfits = {}
    tree = with_defaults(_nest(saved))
    config = build(resolve(tree, misfits=misfits), misfits=misfits)
    defaults = run_identity(config) if config else {}
    return {**saved, **{key: defaults[key] for key in lacking & defaults.keys()}}


def flatten(tree: Mapping[str, Plain], *, prefix: str = "") -> dict[str, Plain]:
    """Nested mappings as one mapping with dotted keys; lists stay whole."""
    return dict(_leaves(tree, prefix))


def _nest(flat: Mapping[str, Plain]) -> dict[str, Plain]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Plain] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _leaves(tree: Mapping[str, Plain], prefix: str) -> Iterator[tuple[str, Plain]]:
    for key, value in tree.items():
        if is_mapping(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(before: Mapping[str, Plain], after: Mapping[str, Plain]) -> list[str]:
    return [
        f"{key}: {_show(before, key)} -> {_show(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or before[key] != after[key]
    ]


def _show(values: Mapping[str, Plain], key: str) -> str:
    return repr(values[key]) if key in values else "-"


def _load_yaml(file: Path) -> dict[str, Plain]:
    import yaml
    from omegaconf import OmegaConf

    try:
        # The same YAML dialect as the experiment files: 3e-4 is a number, a repeated key an error.
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist; a run folder contains the {CONFIG_FILE} that `emu35 run` wrote"
        ) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if not is_mapping(tree):
        raise ConfigError(f"{file} holds no configuration; expected sections such as model, stage")
    return dict(tree)
