"""What a checkpoint of the tokenizer's training holds, in one file, whatever wrote it.

All weights and moments are whole, by name and in fp32; so a run may be continued in another number
of ranks, with ZeRO-1 or without. The data position is the step number itself.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emu35.errors import CheckpointError
from emu35.parallel.collectives import is_main
from emu35.stages.ibq.engine import Engine, Moments
from emu35.vision.ibq.ema import AveragedIBQ
from emu35.vision.pictures import AspectPictures, SquarePictures

STATE = "ibq.pt"


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """All that a step changes.

    ``networks`` are by the name of their part of the file (tokenizer, projector, adversary), and
    ``engines`` by the optimizer's (generator, discriminator). ``pictures`` say which data in
    which order.
    """

    networks: Mapping[str, nn.Module]
    average: AveragedIBQ
    engines: Mapping[str, Engine]
    pictures: SquarePictures | AspectPictures

    def save(self, folder: Path) -> None:
        """Collective: moments may be spread over ranks. One rank writes."""
        moments = {
            name: {weight: asdict(found) for weight, found in engine.moments().items()}
            for name, engine in self.engines.items()
        }
        if not is_main():
            return
        content = {
            "networks": {name: part.state_dict() for name, part in self.networks.items()},
            "average": self.average.model.state_dict(),
            "updates": self.average.updates,
            "moments": moments,
            "pictures": self.pictures.identity,
        }
        torch.save(content, folder / STATE)

    def load(self, folder: Path) -> bool:
        """Restore :meth:`save`; False, and nothing is changed, where it saw other pictures.

        Raises:
            CheckpointError: the state is of another architecture or objective.
        """
        # Mapped, not read: a second copy of everything would not fit beside the first.
        content: dict[str, Any] = torch.load(
            folder / STATE, map_location="cpu", mmap=True, weights_only=True
        )
        if content["pictures"] != self.pictures.identity:
            return False
        if "networks" not in content:
            raise CheckpointError(
                f"{folder} was written when training had one optimizer, and cannot be continued; "
                "start a new run with stage.init_from naming a tokenizer of the old one"
            )
        held, wanted = (", ".join(part) for part in (content["networks"], self.networks))
        if held != wanted:
            raise CheckpointError(
                f"{folder} holds {held}, but this objective trains {wanted}; continue it with the "
                "terms it was made with, or start a new run with stage.init_from"
            )
        try:
            for name, part in self.networks.items():
                part.load_state_dict(content["networks"][name])
            self.average.model.load_state_dict(content["average"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder} holds another architecture ({error}); continue it with the "
                "configuration it was made with, or start a new run with stage.init_from"
            ) from error
        self.average.updates = content["updates"]
        for name, engine in self.engines.items():
            engine.adopt()
            moments = content["moments"][name]
            engine.load_moments({key: Moments(**entry) for key, entry in moments.items()})
        return True
