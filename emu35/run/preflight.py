"""What must exist on this host before ranks start: better one message now than one a rank later."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from emu35.checkpoint.published import start_problems
from emu35.config.data import TokenDataConfig, is_drawn
from emu35.config.dida_eval import DiDAEvalConfig
from emu35.config.grpo import GRPOConfig
from emu35.config.images import ImageDataConfig
from emu35.config.io import CONFIG_FILE
from emu35.config.model import LMConfig
from emu35.config.prompts import PromptDataConfig
from emu35.config.root import RunConfig
from emu35.config.stage import IBQStageConfig
from emu35.config.tokenizer_eval import TokenizerEvalConfig
from emu35.data.place import is_url
from emu35.errors import ConfigError


def check_inputs(config: RunConfig) -> None:
    """Check that everything the run reads is there.

    Raises:
        ConfigError: naming every missing input.
    """
    problems = [*_unnamed(config), *_data(config), *_start(config), *_tokenizer(config)]
    if problems:
        raise ConfigError(problems)


def check_named(config: RunConfig) -> None:
    """Check that the run says what it reads; whether that exists is for the hosts that run it.

    Raises:
        ConfigError: it names no data.
    """
    problems = list(_unnamed(config))
    if problems:
        raise ConfigError(problems)


def _unnamed(config: RunConfig) -> Iterator[str]:
    data = config.data
    if isinstance(config.stage, DiDAEvalConfig | TokenizerEvalConfig):
        return  # it trains on none
    if isinstance(data, TokenDataConfig) and not data.sources:
        yield (
            "data.sources is empty; name token shards as in "
            "data.sources.NAME.path=FOLDER (emu35 data ingest writes them)"
        )
    if isinstance(data, ImageDataConfig) and not data.paths:
        yield "data.paths is empty; name tars or folders of pictures as in data.paths=[FOLDER]"


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if isinstance(data, TokenDataConfig):
        for name, source in data.sources.items():
            if is_drawn(source):
                yield from _folder(f"data.sources.{name}.path", source.path)
        for name, validation in data.validation.items():
            yield from _folder(f"data.validation.{name}.path", validation.path)
    elif isinstance(data, PromptDataConfig):
        for kind, tasks in (("tasks", data.tasks), ("validation", data.validation)):
            for name, task in tasks.items():
                if not Path(task.path).is_file():
                    where = f"data.{kind}.{name}.path={task.path}"
                    yield f"{where} is no file; expected prompts, a JSON object a line"
    elif isinstance(data, ImageDataConfig):
        for key, paths in (("paths", data.paths), ("validation_paths", data.validation_paths)):
            for path in paths:
                # A pattern is expanded by the reader, which reports one that matches nothing.
                if not Path(path).exists() and not any(mark in path for mark in "*?["):
                    yield f"data.{key}: {path} does not exist"


def _start(config: RunConfig) -> Iterator[str]:
    if isinstance(config.stage, DiDAEvalConfig):
        from emu35.stages.dida_eval.inputs import input_problems

        yield from input_problems(config.stage)
        return
    if isinstance(config.stage, TokenizerEvalConfig):
        from emu35.stages.tokenizer_eval.inputs import missing_inputs

        yield from missing_inputs(config.stage)
        return
    if config.stage.init_from is None:
        return
    # A run that resumes has weights of its own; its parent may be gone by then.
    checkpoints = Path(config.run_dir).expanduser() / "checkpoints"
    # Reinforcement learning reads its parent at every start: it is the reference.
    if any(checkpoints.glob("step_*")) and not isinstance(config.stage, GRPOConfig):
        return
    origin = Path(config.stage.init_from)
    if not origin.exists():
        yield f"stage.init_from={origin} does not exist"
    elif isinstance(config.model, LMConfig):
        if (origin / CONFIG_FILE).is_file() and not any((origin / "checkpoints").glob("step_*")):
            yield f"stage.init_from={origin} holds no checkpoint yet; train that run first"
        yield from start_problems(origin, run=config)


def _tokenizer(config: RunConfig) -> Iterator[str]:
    """What training an image tokenizer needs besides pictures."""
    stage = config.stage
    if not isinstance(stage, IBQStageConfig):
        return
    perceptual, distillation = stage.perceptual, stage.distillation
    if perceptual.weight > 0:
        for key, path in (("weights", perceptual.weights), ("heads", perceptual.heads)):
            if path and not Path(path).is_file():
                yield (
                    f"stage.perceptual.{key}={path} does not exist; scripts/fetch_lpips.py --out "
                    "writes one"
                )
    teacher = distillation.teacher
    if distillation.weight > 0 and teacher and not Path(teacher).is_dir():
        yield f"stage.distillation.teacher={teacher} is no folder; expected a SigLIP checkpoint"
    several = config.launch.world_size > 1
    if config.parallel.zero1 and several and find_spec("deepspeed") is None:
        yield (
            "parallel.zero1=true needs DeepSpeed, which is not installed; "
            "pip install 'emu35[tokenizer]', or set parallel.zero1=false"
        )


def _folder(key: str, path: str) -> Iterator[str]:
    # Whether a URL can be read is seen when its shards are opened, by every host for itself.
    if not is_url(path) and not Path(path).is_dir():
        yield f"{key}={path} is no folder; expected token shards (emu35 data ingest writes them)"
