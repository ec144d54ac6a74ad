"""What an evaluation reads, looked at before torch is imported and a weight is read."""

from collections.abc import Iterator
from pathlib import Path

from emu35.config.dida_eval import DiDAEvalConfig, Features
from emu35.config.io import CONFIG_FILE
from emu35.data.scenes.quality import read_scene_prompts
from emu35.errors import ConfigError, DataError
from emu35.stages.picture_features import require_inception


def input_problems(stage: DiDAEvalConfig) -> Iterator[str]:
    """Why the evaluation cannot be made from the files that are there, as sentences."""
    yield from _source(Path(stage.init_from or "").expanduser())
    if stage.vision is not None and not Path(stage.vision).expanduser().is_dir():
        yield f"stage.vision={stage.vision} is no folder; expected an image tokenizer"
    try:
        read_scene_prompts(Path(stage.prompts).expanduser(), count=stage.count or None)
    except DataError as error:
        yield f"stage.prompts: {error}"
    if stage.features is Features.inception:
        try:
            require_inception(asked="stage.features=inception", instead="stage.features=tokenizer")
        except ConfigError as error:
            yield str(error)


def _source(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield f"stage.init_from={path} does not exist; give the run of stage=dida, or its release"
    elif (path / CONFIG_FILE).is_file() and not any((path / "checkpoints").glob("step_*")):
        yield f"stage.init_from={path} holds no checkpoint yet; train that run first"
