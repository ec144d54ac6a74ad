"""From a run to a run folder of another layout that continues it.

Resuming in another layout needs no such step: checkpoints are independent of it. This makes what
moves: one checkpoint, checked, with a configuration that fits the new machine, and optionally
without the optimizer or of another type of parameters.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from emu35.checkpoint.manager import Checkpoint, CheckpointManager, find_checkpoint
from emu35.checkpoint.manifest import MANIFEST
from emu35.checkpoint.reshard import convert_state
from emu35.checkpoint.sharded import OPTIMIZER_FILE, STATE_FOLDER
from emu35.checkpoint.source import DTYPES
from emu35.checkpoint.steps import CHECKPOINTS
from emu35.config import LMConfig, ParallelConfig, Precision, RunConfig
from emu35.config.io import read_config, run_identity, write_config
from emu35.errors import CheckpointError
from emu35.stages.output import appearing, refuse_nonempty

Message = Callable[[str], object]


@dataclass(kw_only=True, slots=True, frozen=True)
class ReshardOptions:
    """``run`` is a run folder, ``out`` the folder to make, ``config`` that of ``run`` with another
    layout; ``step`` the newest checkpoint by default.

    ``dtype`` is the type of the parameters, that of training by default. ``weights_only`` leaves
    the optimizer out: such a folder can be started from, generated with and exported, not resumed.
    """

    run: Path
    out: Path
    config: RunConfig
    step: int | None = None
    dtype: Precision | None = None
    weights_only: bool = False


def reshard(options: ReshardOptions, *, message: Message = print) -> Path:
    """Write the run folder; ``options.out`` appears only when it is complete and was compared.

    Raises:
        ReleaseError: ``out`` is not empty, or cannot be written.
        CheckpointError: no usable checkpoint, one without the optimizer that is asked for, or a
            run of a stage that trains no language model.
    """
    refuse_nonempty(options.out)
    if not isinstance(options.config.model, LMConfig):
        raise CheckpointError(
            f"{options.run} is a run of stage={options.config.stage.kind}, whose state every rank "
            "holds whole; there is no layout to change"
        )
    found = find_checkpoint(options.run / CHECKPOINTS, step=options.step, message=message)
    if found is None:
        raise CheckpointError(
            f"{options.run / CHECKPOINTS} holds no checkpoint yet; train the run first"
        )
    if not options.weights_only and not (found.path / OPTIMIZER_FILE).is_file():
        raise CheckpointError(f"{found.path} holds weights alone; add --weights-only")
    config = _config(options)
    with appearing(options.out) as folder:
        _take_along(options, config=config, folder=folder)
        write_config(config, folder)
        manager = CheckpointManager(
            root=folder / CHECKPOINTS,
            config=config.checkpoint,
            identity=run_identity(config),
            message=message,
        )
        manager.save(
            found.step,
            write=lambda place: _write(place, found=found, options=options, message=message),
            extra=found.extra,
        )
    message(
        f"step {found.step} of {options.run} as the run {options.out}: "
        f"{_words(config.parallel)}, {config.stage.precision.value}"
        + (", weights only" if options.weights_only else "")
    )
    return options.out


def _config(options: ReshardOptions) -> RunConfig:
    precision = options.dtype or options.config.stage.precision
    stage = replace(options.config.stage, precision=precision)
    return replace(options.config, run_dir=str(options.out.absolute()), stage=stage)


def _write(place: Path, *, found: Checkpoint, options: ReshardOptions, message: Message) -> None:
    (place / STATE_FOLDER).mkdir()
    convert_state(
        found.path / STATE_FOLDER,
        place / STATE_FOLDER,
        dtype=DTYPES[options.dtype or options.config.stage.precision],
        optimizer=not options.weights_only,
        message=message,
    )
    if options.weights_only:
        return
    moved = read_config(options.run).parallel != options.config.parallel
    for path in found.path.iterdir():
        # Generators belong to the ranks of a layout; the rest to every layout.
        if path.is_file() and path.name != MANIFEST and not (moved and path.match("rng_*")):
            shutil.copyfile(path, place / path.name)


def _take_along(options: ReshardOptions, *, config: RunConfig, folder: Path) -> None:
    """Tokenizers that lie in the old run folder (as an import leaves them there)."""
    old, new = options.run.absolute(), options.out.absolute()
    tokenizer = replace(config.tokenizer)
    for name in ("vision", "table"):
        value = getattr(tokenizer, name)
        place = Path(value).expanduser().absolute() if value else None
        if place is None or not place.is_relative_to(old) or not place.exists():
            continue
        inside = place.relative_to(old)
        copy = shutil.copytree if place.is_dir() else shutil.copyfile
        (folder / inside).parent.mkdir(parents=True, exist_ok=True)
        copy(place, folder / inside)
        setattr(tokenizer, name, str(new / inside))
    config.tokenizer = tokenizer


def _words(parallel: ParallelConfig) -> str:
    sizes = ", ".join(f"{name}={getattr(parallel, name)}" for name in ("tp", "pp", "vpp", "cp"))
    return f"{sizes}, zero1={str(parallel.zero1).lower()}"
