"""A step of the tokenizer's training, and what the trainer needs around it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from emu35.config import (
    IBQConfig,
    IBQStageConfig,
    ImageDataConfig,
    OptimConfig,
    Precision,
    RunConfig,
)
from emu35.errors import ConfigError, DataError
from emu35.parallel.collectives import (
    is_main,
    objects_of_ranks,
    rank,
    world_size,
    worst_over_ranks,
)
from emu35.stages.ibq.codebook import start_codebook
from emu35.stages.ibq.engine import CODEBOOK, Engine, build_engine
from emu35.stages.ibq.files import REJECTS, write_rejects
from emu35.stages.ibq.objective import Means, Objective
from emu35.stages.ibq.over_ranks import sum_over_ranks
from emu35.stages.ibq.pictures import open_training_pictures
from emu35.stages.ibq.state import TrainingState
from emu35.stages.ibq.validation import share_used, validate, validation_batches
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.optim import learning_rate
from emu35.vision.ibq.ema import AveragedIBQ
from emu35.vision.ibq.folder import read_folder
from emu35.vision.ibq.init import initialize
from emu35.vision.ibq.model import IBQ, Through
from emu35.vision.pictures import PictureBatches, Rejects, SquarePictures, find_pictures

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class IBQTask:
    """What the trainer drives: steps, validation, and the state of both."""

    def __init__(self, config: RunConfig, *, run_dir: Path, device: torch.device) -> None:
        assert isinstance(config.model, IBQConfig)
        assert isinstance(config.stage, IBQStageConfig)
        assert isinstance(config.data, ImageDataConfig)
        self.config, self.stage, self.data = config, config.stage, config.data
        self.run_dir, self.device = run_dir, device
        self.guard, self.clock = Guard(config.guard), StepClock(device=device)
        self.continuous_steps = int(self.stage.quantizer_warmup * self.stage.steps)
        # Steps from which on the loss has another meaning.
        self._turns = {self.continuous_steps + 1, self.stage.adversarial.start_step}
        self.rejects = Rejects()
        self.pictures = open_training_pictures(
            config.data,
            run_dir=run_dir,
            factor=config.model.factor,
            seed=config.seed,
            micro_batch_size=self.stage.micro_batch_size,
            rejects=self.rejects,
        )
        self.validation = (
            self._open(config.data.validation_paths) if config.data.validation_paths else None
        )
        self.batches = PictureBatches(
            self.pictures,
            global_batch_size=self.stage.global_batch_size,
            rank=rank(),
            ranks=world_size(),
            micro_batch_size=self.stage.micro_batch_size,
            threads=self.data.decode_threads,
        )
        self.model = _build(config.model, seed=config.seed, device=device)
        self.average = AveragedIBQ(self.model, decay=self.stage.ema_decay)
        self.objective = Objective(self.stage, model=config.model, seed=config.seed, device=device)
        self.engines = self._engines()
        self.state = self._state()

    def close(self) -> None:
        """End the threads that read ahead."""
        self.batches.close()

    # ------------------------------------------------------------------ training

    @property
    def finished(self) -> str | None:
        """Never before ``stage.steps``."""
        return None

    def start(self) -> None:
        """The weights of the tokenizer that ``stage.init_from`` names, if it names one.

        Raises:
            ConfigError: it has another architecture.
        """
        origin = self.stage.init_from
        if origin is None:
            return
        source = read_folder(Path(origin))
        if source.config != self.config.model:
            raise ConfigError(
                f"stage.init_from={origin} holds {source.config}, "
                f"but model is {self.config.model}; make them equal"
            )
        for model in (self.model, self.average.model):
            model.load_state_dict(source.state_dict())
        self.engines[GENERATOR].adopt()

    def train_step(self, step: int) -> dict[str, float]:
        """One update of each network on one global batch, unless the guard refuses it; ``tokens``
        counts codes."""
        if step == self.continuous_steps + 1 and self.continuous_steps:
            self._start_codebook()
        if step in self._turns:
            self.guard.forget()
        with self.clock.marked(Phase.data):
            micro_batches = self.batches.micro_batches(step)
        means = Means(micro_batches=len(micro_batches))
        used_K = torch.zeros(self.model.config.n_embed, device=self.device)
        before = self._buffers_of_adversary()
        self.model.train()
        with self.clock.marked(Phase.forward_backward):
            for pixels in micro_batches:
                self.clock.beat()
                with self.clock.own():
                    self._micro_step(step, pixels=pixels, means=means, used_K=used_K)
        losses = means.over_ranks()
        updated = self._update(step, losses=losses, before=before)
        area = sum(batch.shape[0] * batch.shape[2] * batch.shape[3] for batch in micro_batches)
        codes = torch.tensor(area // self.model.config.factor**2, device=self.device)
        rejected = torch.tensor(float(len(self.rejects)), device=self.device)
        return {
            **losses,
            "codebook_usage": share_used(sum_over_ranks(used_K)),
            "rejected": float(sum_over_ranks(rejected).item()),
            **updated,
            "tokens": float(sum_over_ranks(codes).item()),
        }

    def _micro_step(
        self, step: int, *, pixels: np.ndarray, means: Means, used_K: torch.Tensor
    ) -> None:
        """Gradients of both networks from one pass through the tokenizer."""
        pixels_B3HW = self._to_device(pixels)
        through = Through.nothing if step <= self.continuous_steps else Through.codebook
        with self._precision():
            output = self.objective.reconstruct(
                self.model, pixels_B3HW=pixels_B3HW, through=through
            )
        terms = self.objective.generator_terms(output, pixels_B3HW=pixels_B3HW, step=step)
        self.engines[GENERATOR].backward(terms.total / means.micro_batches)
        means.add(terms.logged)
        if self.objective.discriminator_learns(step):
            terms = self.objective.discriminator_terms(output, pixels_B3HW=pixels_B3HW)
            self.engines[DISCRIMINATOR].backward(terms.total / means.micro_batches)
            means.add(terms.logged)
        if output.quantized is not None:
            used_K[output.quantized.codes_BHW.flatten()] = 1.0

    def _update(
        self, step: int, *, losses: dict[str, float], before: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """Reduce gradients over the ranks, and update both networks or neither; norms and rates.
        ``before`` is the adversary's state before the step."""
        learn = [GENERATOR]
        if self.objective.discriminator_learns(step):
            learn.append(DISCRIMINATOR)
        with self.clock.marked(Phase.reduction):
            norms = {name: self.engines[name].reduce() for name in learn}
        rates = {
            name: learning_rate(self._optim(name), step=step, steps=self.stage.steps)
            for name in learn
        }
        if self._accepts(losses, norms=norms):
            with self.clock.marked(Phase.optimizer):
                for name in learn:
                    self.engines[name].step(lr=rates[name])
                self.average.update(self.model)
            if DISCRIMINATOR in learn:
                self.objective.follow(losses)
        else:
            for name in learn:
                self.engines[name].discard()
            if self.objective.adversary is not None:
                self.objective.adversary.load_state_dict(before, strict=False)
        numbers = {"lr": rates[GENERATOR], "grad_norm": norms[GENERATOR]}
        if DISCRIMINATOR in learn:
            numbers["lr_discriminator"] = rates[DISCRIMINATOR]
            numbers["grad_norm_discriminator"] = norms[DISCRIMINATOR]
        return numbers

    def _accepts(self, losses: dict[str, float], *, norms: dict[str, float]) -> bool:
        """The guard's judgement of the step. Spikes are looked for in the generator alone: the
        discriminator's losses rise whenever the generator learns something."""
        loss, norm, *others = worst_over_ranks(
            [
                losses["loss"],
                norms[GENERATOR],
                losses.get("loss_discriminator", 0.0),
                norms.get(DISCRIMINATOR, 0.0),
            ]
        )
        if not all(map(math.isfinite, others)):
            self.guard.refuse("its discriminator's loss or gradient norm is not finite")
            return False
        return self.guard.accepts(loss=loss, grad_norm=norm)

    def _buffers_of_adversary(self) -> dict[str, torch.Tensor]:
        """Running statistics and anchors, which a forward pass changes, as they are now."""
        if self.objective.adversary is None:
            return {}
        return {name: buffer.clone() for name, buffer in self.objective.adversary.named_buffers()}

    def _start_codebook(self) -> None:
        start_codebook(
            [self.model, self.average.model],
            pictures=self.pictures,
            resolution=self.data.resolution,
            batch=self.stage.micro_batch_size,
            to_device=self._to_device,
            seed=self.config.seed,
            beat=self.clock.beat,
        )
        self.engines[GENERATOR].adopt()
        self.engines[GENERATOR].forget(CODEBOOK)

    # ---------------------------------------------------------------- validation

    def validate(self, step: int) -> dict[str, float]:
        """Reconstruct held-out pictures with the averaged weights; the first ones as a grid."""
        del step
        self.write_rejects()
        if self.validation is None:
            return {}
        return validate(
            self.average.model,
            batches_B3HW=validation_batches(
                self.validation,
                count=self.data.validation_images,
                batch=self.stage.micro_batch_size,
                to_device=self._to_device,
                beat=self.clock.beat,
            ),
            run_dir=self.run_dir,
            device=self.device,
        )

    def write_rejects(self) -> None:
        """Name the rejected pictures of all ranks in one file."""
        found = objects_of_ranks(dict(self.rejects.reasons))
        if is_main():
            write_rejects(self.run_dir / REJECTS, reasons=found)

    # -------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Everything that a step changes; one rank writes."""
        self.state.save(folder)

    def load(self, folder: Path) -> None:
        """Restore :meth:`save`.

        Raises:
            DataError: the training pictures are not those of the checkpoint.
            CheckpointError: the state is of another architecture or objective.
        """
        if not self.state.load(folder):
            raise DataError(
                f"the pictures under data.paths={list(self.data.paths)} are not those that "
                f"{folder} was trained on (names, sizes, scores or order changed, or what "
                "data.bucket_group=0 takes from stage.micro_batch_size), so their order cannot be "
                "continued; restore them, or start a new run with init_from"
            )

    # -------------------------------------------------------------------- parts

    def _engines(self) -> dict[str, Engine]:
        networks: dict[str, torch.nn.Module] = {GENERATOR: self.objective.generator(self.model)}
        if self.objective.adversary is not None:
            networks[DISCRIMINATOR] = self.objective.adversary.discriminator
        return {
            name: build_engine(
                network,
                config=self._optim(name),
                zero1=self.config.parallel.zero1,
                device=self.device,
            )
            for name, network in networks.items()
        }

    def _state(self) -> TrainingState:
        networks: dict[str, torch.nn.Module] = {"tokenizer": self.model}
        if self.objective.distillation is not None:
            networks["projector"] = self.objective.distillation.projector
        if self.objective.adversary is not None:
            networks["adversary"] = self.objective.adversary
        return TrainingState(
            networks=networks,
            average=self.average,
            engines=self.engines,
            pictures=self.pictures,
        )

    def _optim(self, name: str) -> OptimConfig:
        """Settings of one of the two optimizers; the discriminator may have a rate of its own, on
        the same schedule."""
        optim, own = self.config.optim, self.stage.adversarial.lr
        if name == GENERATOR or own is None:
            return optim
        share = optim.min_lr / optim.lr if optim.lr > 0 else 0.0
        return replace(optim, lr=own, min_lr=own * share)

    def _open(self, paths: list[str]) -> SquarePictures:
        assert isinstance(self.config.model, IBQConfig)
        return SquarePictures(
            find_pictures(paths, rejects=self.rejects),
            resolution=self.data.resolution,
            factor=self.config.model.factor,
            crop=self.data.crop,
            seed=self.config.seed,
            rejects=self.rejects,
        )

    def _to_device(self, pictures: np.ndarray) -> torch.Tensor:
        pixels_B3HW = torch.from_numpy(pictures).to(self.device).float() / 127.5 - 1
        return pixels_B3HW.contiguous(memory_format=_memory_format(self.device))

    def _precision(self) -> torch.autocast:
        enabled = self.stage.precision is Precision.bf16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


def _build(config: IBQConfig, *, seed: int, device: torch.device) -> IBQ:
    """The network, drawn from the seed and so alike on every rank."""
    model = IBQ(config)
    initialize(model, seed=seed)
    model.to(device)
    model.to(memory_format=_memory_format(device))  # type: ignore[call-overload]
    return model


def _memory_format(device: torch.device) -> torch.memory_format:
    """Tensor cores want channels last; on a CPU the plain layout is a little faster."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
