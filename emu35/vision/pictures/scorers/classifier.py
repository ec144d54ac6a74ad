"""A classifier from a local file, ONNX or TorchScript, as a scorer."""

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import file_digest
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu35.config.images import Activation, ClassifierScorerConfig, Fit
from emu35.errors import ConfigError
from emu35.parallel.device import local_device
from emu35.vision.pictures.scorers import Picture

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Pixels [N, 3, S, S] -> first output [N, ...]."""


class Classifier:
    """One output of a classifier: see :class:`~emu35.config.images.ClassifierScorerConfig`. What a
    higher score means, the model's makers say."""

    def __init__(self, name: str, *, config: ClassifierScorerConfig) -> None:
        """
        Raises:
            ConfigError: there is no such file, it holds no model, or onnxruntime is not installed.
        """
        self.name = name
        self.side = config.side
        self._config = config
        self._path = Path(config.path)
        if not self._path.is_file():
            raise ConfigError(f"data.scorers.{name}: there is no file {self._path}")
        self._run = self._onnx() if self._path.suffix == ".onnx" else self._torchscript()

    @property
    def identity(self) -> str:
        """The file's bytes and every setting that decides a score."""
        config, digest = self._config, self._digest
        settings = (config.side, config.fit, config.channels, config.mean, config.std)
        return f"classifier {digest} {settings} {config.output} {config.activation}"

    @cached_property
    def _digest(self) -> str:
        with self._path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    def score(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        """
        Raises:
            ConfigError: the model does not take such pictures, or has no such output.
        """
        if not len(pictures):
            return np.zeros(0)
        pixels_N3SS = np.stack([self._pixels(picture) for picture in pictures])
        try:
            output = self._run(pixels_N3SS)
        except Exception as error:
            # Neither onnxruntime's errors nor TorchScript's have a base of their own.
            raise ConfigError(
                f"data.scorers.{self.name}: {self._path} cannot score pixels "
                f"{list(pixels_N3SS.shape)} ({error}); correct side, or the file"
            ) from error
        output_NO = output.reshape(len(pictures), -1).astype(np.float64)
        config = self._config
        if config.output >= output_NO.shape[1]:
            raise ConfigError(
                f"data.scorers.{self.name}.output={config.output}, but {self._path} has "
                f"{output_NO.shape[1]} outputs (from 0); name one of these"
            )
        return _activated(output_NO, activation=config.activation)[:, config.output]

    def _pixels(self, picture: Picture) -> NDArray[np.float32]:
        """fp32 [3, S, S], normalised."""
        config, image = self._config, Image.fromarray(picture)
        if config.fit is Fit.centre:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if image.size != (config.side, config.side):
            image = image.resize((config.side, config.side), Image.Resampling.BICUBIC)
        values_SS3 = np.asarray(image, dtype=np.float32) / 255
        if config.channels == "bgr":
            values_SS3 = values_SS3[:, :, ::-1]
        mean, std = (np.array(values, dtype=np.float32) for values in (config.mean, config.std))
        return ((values_SS3 - mean) / std).transpose(2, 0, 1).astype(np.float32)

    def _onnx(self) -> Run:
        try:
            runtime: Any = import_module("onnxruntime")
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"data.scorers.{self.name} needs onnxruntime, which cannot be imported ({error}); "
                "pip install 'emu35[rewards]', or give a TorchScript file"
            ) from error
        try:
            session: Any = runtime.InferenceSession(
                str(self._path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # onnxruntime's errors have no base of their own.
            raise self._no_model(error) from error
        (first, *others) = session.get_inputs()
        if others or len(first.shape) != 4:
            shapes = [item.shape for item in session.get_inputs()]
            raise ConfigError(
                f"data.scorers.{self.name}: {self._path} takes inputs of shapes {shapes}; a "
                "classifier takes one [N, 3, side, side]"
            )
        one_by_one = first.shape[0] == 1

        def run(pixels_N3SS: NDArray[np.float32]) -> NDArray[np.float32]:
            # Published models may fix the first size to 1.
            parts = np.split(pixels_N3SS, len(pixels_N3SS)) if one_by_one else [pixels_N3SS]
            return np.concatenate([session.run(None, {first.name: part})[0] for part in parts])

        return run

    def _torchscript(self) -> Run:
        try:
            device = torch.device(self._config.device)
            if device == torch.device("cuda") and torch.cuda.is_available():
                device = local_device()
            model = torch.jit.load(str(self._path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise self._no_model(error) from error

        @torch.inference_mode()
        def run(pixels_N3SS: NDArray[np.float32]) -> NDArray[np.float32]:
            output = model(torch.from_numpy(pixels_N3SS).to(device))
            first = output[0] if isinstance(output, tuple | list) else output
            return first.float().cpu().numpy()

        return run

    def _no_model(self, error: Exception) -> ConfigError:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return ConfigError(
            f"data.scorers.{self.name}: {self._path} cannot be opened ({first}); give an ONNX "
            "file (.onnx) or a TorchScript file (torch.jit.save), not a state dict"
        )


def _activated(output_NO: NDArray[np.float64], *, activation: Activation) -> NDArray[np.float64]:
    if activation is Activation.sigmoid:
        return 0.5 + 0.5 * np.tanh(output_NO / 2)  # the logistic function, without overflow
    if activation is Activation.softmax:
        weights_NO = np.exp(output_NO - output_NO.max(axis=1, keepdims=True))
        return weights_NO / weights_NO.sum(axis=1, keepdims=True)
    return output_NO
