"""What an evaluation reads, looked at before torch is imported and a weight is read."""

from collections.abc import Iterator
from pathlib import Path

from emu35.config.tokenizer_eval import Fid, TokenizerEvalConfig
from emu35.errors import ConfigError
from emu35.stages.picture_features import require_inception

FID_ASKED = {"asked": "stage.fid=required", "instead": "stage.fid=where_installed"}


def missing_inputs(stage: TokenizerEvalConfig) -> Iterator[str]:
    """Why nothing can be measured with the files that are there, as sentences."""
    for name, folder in stage.tokenizers.items():
        if not Path(folder).expanduser().is_dir():
            yield (
                f"stage.tokenizers.{name}={folder} is no folder; expected an image tokenizer, such "
                "as vision_tokenizer in a release or in a run of stage=ibq"
            )
    for key, paths in (("pictures", stage.pictures), ("text.pictures", stage.text.pictures)):
        for path in paths:
            # A pattern is expanded by the reader, which reports one that matches nothing.
            if not Path(path).exists() and not any(mark in path for mark in "*?[{"):
                yield f"stage.{key}: {path} does not exist; name folders, tars or picture files"
    files = {
        "lpips.weights": stage.lpips.weights,
        "lpips.heads": stage.lpips.heads,
        "faces.embedder": stage.faces.embedder,
        "faces.detector": stage.faces.detector,
    }
    for key, file in files.items():
        if file is not None and not Path(file).expanduser().is_file():
            yield f"stage.{key}={file} is no file; expected weights, or leave it out"
    if stage.fid is Fid.required:
        try:
            require_inception(**FID_ASKED)
        except ConfigError as error:
            yield str(error)
