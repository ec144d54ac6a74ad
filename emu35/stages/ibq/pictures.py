"""The pictures of a tokenizer's training: found, looked at, filtered, and opened."""

from collections.abc import Sequence
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu35.config import ImageDataConfig
from emu35.config.images import AestheticsScorerConfig, Buckets, ScorerConfig
from emu35.config.reward_local import AestheticsModelRewardConfig
from emu35.errors import ConfigError
from emu35.files import atomic_file
from emu35.parallel.collectives import is_main
from emu35.rewards.aesthetics_model import AestheticsModelReward
from emu35.stages.output import unwritable
from emu35.vision.pictures import (
    AspectPictures,
    Rejects,
    SquarePictures,
    find_pictures,
)
from emu35.vision.pictures.filters import Selection
from emu35.vision.pictures.scorers import Picture, PictureScorer
from emu35.vision.pictures.select import needs_survey, select_pictures

FILTERED = "filtered.jsonl"
"""Pictures that a filter left out, with the reason; broken ones are in rejects.jsonl."""

SCORES = "picture_scores"
"""Folder within the run folder: the scores, unless data.score_cache names another, and what could
not be read."""


def open_training_pictures(
    data: ImageDataConfig,
    *,
    run_dir: Path,
    factor: int,
    seed: int,
    micro_batch_size: int,
    rejects: Rejects,
) -> SquarePictures | AspectPictures:
    """What ``data.paths`` holds and ``data.filters`` leave, in the shapes of ``data.buckets``.
    Collective; the main rank writes :data:`FILTERED` and says how many are used.

    Raises:
        DataError: there is no picture, too few are left, or too many are broken.
        ConfigError: a scorer's model cannot be used.
    """
    files = find_pictures(data.paths, rejects=rejects)
    sizes_N2 = np.zeros((0, 2), dtype=np.int64)
    if needs_survey(data):
        selection = select_pictures(
            files,
            data=data,
            cache=Path(data.score_cache) if data.score_cache else run_dir / SCORES,
            make_scorer=_make_scorer,
            message=_say,
            memory=run_dir / SCORES,
        )
        if is_main():
            # Ranks count their rejects together, so one of them names what all know.
            selection.reject_broken(rejects)
            _write_filtered(run_dir / FILTERED, selection=selection)
            _say(selection.summary())
        files = files.choose(selection.kept)
        if selection.sizes_N2 is not None:
            sizes_N2 = selection.sizes_N2[selection.kept]
    if data.buckets is Buckets.square:
        return SquarePictures(
            files,
            resolution=data.resolution,
            factor=factor,
            seed=seed,
            rejects=rejects,
            crop=data.crop,
            flip=data.flip,
        )
    pictures = AspectPictures(
        files,
        sizes_N2=sizes_N2,
        resolution=data.resolution,
        factor=factor,
        seed=seed,
        rejects=rejects,
        group=data.bucket_group or micro_batch_size,
        crop=data.crop,
        flip=data.flip,
    )
    sizes = ", ".join(f"{w}x{h}: {count}" for (w, h), count in pictures.counts.items())
    _say(f"pictures by size: {sizes}")
    return pictures


class AestheticsScorer:
    """LAION's aesthetic predictor, or another of its form: higher is better liked, 1 to 10."""

    def __init__(self, name: str, *, config: AestheticsScorerConfig) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, the model's folder lacks a file, or the
                head's file does not hold linear layers that fit each other.
        """
        self.name = name
        self.side = config.side
        self._config = config
        try:
            self._reward = AestheticsModelReward(
                AestheticsModelRewardConfig(
                    model=config.model, head=config.head, device=config.device
                )
            )
        except ConfigError as error:
            raise ConfigError(f"data.scorers.{name}: {error}") from error

    @property
    def identity(self) -> str:
        """The bytes of the model and its head."""
        return f"aesthetics_model {self._digest} at {self.side} px"

    @cached_property
    def _digest(self) -> str:
        digest = sha256()
        for path in [*sorted(Path(self._config.model).glob("*")), Path(self._config.head)]:
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(path.name.encode() + file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def score(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        if not len(pictures):
            return np.zeros(0)
        return self._reward.judge(pictures).double().numpy()


def _make_scorer(name: str, config: ScorerConfig) -> PictureScorer:
    assert isinstance(config, AestheticsScorerConfig)
    return AestheticsScorer(name, config=config)


def _write_filtered(path: Path, *, selection: Selection) -> None:
    """One line for each picture that a filter left out; no file where there is none."""
    if not (selection.verdict_N >= 0).any():
        path.unlink(missing_ok=True)
        return
    try:
        with atomic_file(path) as file:
            for left_out in selection.left_out():
                file.write(left_out.row())
    except OSError as error:
        raise unwritable(path, error) from error


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)
