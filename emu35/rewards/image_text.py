"""Pictures and texts as vectors of one space: CLIP and SigLIP from a folder, through transformers.

Suffixes: N pictures or texts, D numbers of a vector.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from emu35.config.reward_local import SimilarityRewardConfig
from emu35.errors import ConfigError
from emu35.parallel.device import local_device
from emu35.rewards.optional import optional
from emu35.rewards.sample import Cost, Picture

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""What every folder must have, and one of which: the latter is what transformers 5 writes. Weights
and tokenizers come in several forms."""


class ImageText:
    """A model of a folder; it is read at the first call, once for all threads, which then share
    it.

    Attributes:
        device: where it runs. ``cuda`` without a number is the GPU of this rank.
    """

    def __init__(self, config: SimilarityRewardConfig) -> None:
        """
        Raises:
            ConfigError: transformers is not installed, the folder lacks a file, or the device is
                none.
        """
        self._kind = config.kind
        self._folder = Path(config.model)
        for names in ((CONFIG,), PROCESSORS):
            if not any((self._folder / name).is_file() for name in names):
                raise ConfigError(
                    f"reward kind {config.kind!r}: {self._folder} has no {' or '.join(names)}; "
                    "give model the folder of a CLIP or SigLIP checkpoint as transformers saves it"
                )
        try:
            self.device = torch.device(config.device)
        except RuntimeError as error:
            raise ConfigError(
                f"reward kind {config.kind!r}: device={config.device!r} is none ({error})"
            ) from None
        # Every thread of torch begins on GPU 0, whichever its rank has.
        if self.device == torch.device("cuda") and torch.cuda.is_available():
            self.device = local_device()
        self._transformers = optional("transformers", reward=config.kind)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    @property
    def cost(self) -> Cost:
        """Where its time is spent."""
        return Cost.cpu if self.device.type == "cpu" else Cost.gpu

    @property
    def model_type(self) -> str:
        """``clip``, ``siglip`` ..., as the folder's config.json calls it.

        Raises:
            ConfigError: config.json cannot be read, or is of another kind of model.
        """
        try:
            found = self._transformers.AutoConfig.from_pretrained(
                str(self._folder), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"reward kind {self._kind!r}: {self._folder / CONFIG} cannot be read ({error})"
            ) from error
        return str(found.model_type)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Unit vectors fp32 [N, D] of ``pictures``, on the CPU."""
        model, processor = self._load()
        shown = [Image.fromarray(picture) for picture in pictures]
        inputs = processor.image_processor(images=shown, return_tensors="pt")
        return self._unit(model.get_image_features(**self._placed(inputs)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors fp32 [N, D] of ``texts``, on the CPU; a text that is longer than the model
        reads (64 to 77 tokens) is cut."""
        model, processor = self._load()
        # SigLIP learnt from texts that padding fills to its length, and reads the padding too.
        siglip = model.config.model_type.startswith("siglip")
        inputs = processor.tokenizer(
            list(texts),
            padding="max_length" if siglip else True,
            return_attention_mask=not siglip,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return self._unit(model.get_text_features(**self._placed(inputs)))

    def _load(self) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                model = self._transformers.AutoModel.from_pretrained(
                    str(self._folder), local_files_only=True, dtype=torch.float32
                )
                processor = self._transformers.AutoProcessor.from_pretrained(
                    str(self._folder), local_files_only=True
                )
                self._loaded = model.to(self.device).eval(), processor
            return self._loaded

    def _placed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    @staticmethod
    def _unit(output: Any) -> torch.Tensor:
        # transformers 5 gives the pooled vectors within an output, 4 gave the vectors.
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        features_ND = cast(torch.Tensor, features).float().cpu()
        return features_ND / features_ND.norm(dim=-1, keepdim=True)
