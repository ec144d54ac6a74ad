"""The measures that can be made here, and why others cannot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from emu35.config.reward_local import OcrRewardConfig
from emu35.config.tokenizer_eval import Fid, LpipsConfig, TokenizerEvalConfig
from emu35.errors import ConfigError, DataError
from emu35.parallel.collectives import objects_of_ranks
from emu35.rewards.reader import Reader
from emu35.stages.feature_networks import open_inception
from emu35.stages.picture_features import INCEPTION, FeaturesOf
from emu35.stages.tokenizer_eval.faces import (
    DLIB,
    DLIB_MODELS,
    FaceLikeness,
    dlib_faces,
    onnx_faces,
)
from emu35.stages.tokenizer_eval.inputs import FID_ASKED
from emu35.vision.lpips import Backbone, Lpips, read_lpips

T = TypeVar("T")

REWARDS = "pip install 'emu35[rewards]'"


class Group(StrEnum):
    """Measures that are there, or are missing, together."""

    pixels = "pixels"
    lpips = "lpips"
    fid = "fid"
    wavelets = "wavelets"
    codes = "codes"
    text = "text"
    faces = "faces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruments:
    """What is None cannot be measured, and ``missing`` says what it needs."""

    lpips: Lpips | None
    inception: FeaturesOf | None
    reader: Reader | None
    faces: FaceLikeness | None
    missing: Mapping[Group, str]


def open_instruments(stage: TokenizerEvalConfig, *, device: torch.device) -> Instruments:
    """Open what is configured and installed.

    Raises:
        ConfigError: weights that are named cannot be used; or ``stage.fid=required``, and
            torch-fidelity is not installed; or ranks have different packages.
        DataError: ``stage.fid=required``, and its weights cannot be fetched.
    """
    missing: dict[Group, str] = {}
    instruments = Instruments(
        lpips=_lpips(stage.lpips, device=device, missing=missing),
        inception=_inception(stage.fid, device=device, missing=missing),
        reader=_reader(stage, missing=missing),
        faces=_faces(stage, missing=missing),
        missing=missing,
    )
    every = [dict(each) for each in objects_of_ranks(missing)]
    if any(each.keys() != missing.keys() for each in every):
        raise ConfigError(
            f"ranks lack different measures ({every}); install the same packages on all hosts"
        )
    return instruments


def _lpips(config: LpipsConfig, *, device: torch.device, missing: dict[Group, str]) -> Lpips | None:
    if config.weights is None:
        missing[Group.lpips] = (
            "needs stage.lpips.weights (scripts/fetch_lpips.py --backbone "
            f"{config.backbone} writes them)"
        )
        return None
    return read_lpips(
        Backbone(config.backbone),
        weights=Path(config.weights).expanduser(),
        heads=Path(config.heads).expanduser() if config.heads else None,
        owner="stage.lpips",
    ).to(device)


def _inception(fid: Fid, *, device: torch.device, missing: dict[Group, str]) -> FeaturesOf | None:
    if fid is Fid.never:
        missing[Group.fid] = "stage.fid=never"
    elif fid is Fid.where_installed and find_spec(INCEPTION) is None:
        missing[Group.fid] = "needs torch-fidelity (pip install 'emu35[evaluate]')"
    else:
        return _made(
            lambda: open_inception(device, **FID_ASKED),
            group=Group.fid,
            missing=missing if fid is Fid.where_installed else None,
        )
    return None


def _reader(stage: TokenizerEvalConfig, *, missing: dict[Group, str]) -> Reader | None:
    if not stage.text.generated and not stage.text.pictures:
        missing[Group.text] = "stage.text has no pictures"
    elif not _installed(("rapidocr", "onnxruntime"), group=Group.text, missing=missing):
        return None
    else:
        config = OcrRewardConfig(
            kind="stage.text", side=stage.text.side, confidence=stage.text.confidence
        )
        return _made(lambda: Reader(config), group=Group.text, missing=missing)
    return None


def _faces(stage: TokenizerEvalConfig, *, missing: dict[Group, str]) -> FaceLikeness | None:
    if stage.faces.embedder is not None:
        if not _installed(("cv2", "onnxruntime"), group=Group.faces, missing=missing):
            return None
        return onnx_faces(stage.faces)
    if any(find_spec(name) is None for name in (DLIB, DLIB_MODELS)):
        missing[Group.faces] = (
            "needs dlib and its models (pip install 'emu35[faces]'), or stage.faces.embedder, an "
            "ONNX model of a face recognition network"
        )
        return None
    return _made(lambda: dlib_faces(stage.faces), group=Group.faces, missing=missing)


def _installed(names: tuple[str, ...], *, group: Group, missing: dict[Group, str]) -> bool:
    lacking = [name for name in names if find_spec(name) is None]
    if lacking:
        missing[group] = f"needs {' and '.join(lacking)} ({REWARDS})"
    return not lacking


def _made(make: Callable[[], T], *, group: Group, missing: dict[Group, str] | None) -> T | None:
    """What ``make`` makes; where it cannot, the reason goes to ``missing`` if there is one."""
    try:
        return make()
    except (ConfigError, DataError) as error:
        if missing is None:
            raise
        missing[group] = " ".join(str(error).split())
        return None
