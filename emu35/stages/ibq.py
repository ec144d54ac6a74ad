"""Training the image tokenizer (paper sections 2.3 and 5.2) on square pictures.

``run`` assembles pictures, network and optimizer and hands them to the trainer; what a step does is
:class:`IBQTask`. Ranks are data-parallel replicas: each takes its part of the global batch, the
gradients are averaged, and so the run is the same whatever the number of ranks or micro-batches.
The average of the weights is validated and released, in ``vision_tokenizer/`` of the run folder.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from emu35.config import (
    IBQConfig,
    IBQStageConfig,
    ImageDataConfig,
    OptimConfig,
    Precision,
    RunConfig,
)
from emu35.errors import CheckpointError, ConfigError, DataError
from emu35.parallel.collectives import is_main, rank, sum_over, world_size, worst_over_ranks
from emu35.parallel.mesh import init_mesh
from emu35.stages.ibq_files import RECONSTRUCTIONS, REJECTS, write_grid, write_rejects
from emu35.stages.ibq_pictures import open_training_pictures
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.optim import learning_rate
from emu35.train.trainer import FitResult, fit
from emu35.vision.ibq.calibrate import calibrate, pictures_needed
from emu35.vision.ibq.ema import AveragedIBQ
from emu35.vision.ibq.folder import read_folder, write_folder
from emu35.vision.ibq.init import initialize
from emu35.vision.ibq.losses import IBQWeights, ibq_losses
from emu35.vision.ibq.model import IBQ, Through
from emu35.vision.pictures import (
    PictureBatches,
    Rejects,
    SquarePictures,
    find_pictures,
)

TOKENIZER_FOLDER = "vision_tokenizer"
STATE = "ibq.pt"

GRID_PICTURES = 16
"""Pictures in the reconstruction grid."""

BUCKET_ELEMENTS = 1 << 24
"""Gradient elements reduced over the ranks at once (64 MiB)."""


def run(config: RunConfig, *, run_dir: Path) -> FitResult:
    """Train the tokenizer as configured, or continue what ``run_dir`` holds, and write it.

    Raises:
        Emu35Error: for anything a user can mend; Interrupted after a signal, saved.
    """
    mesh = init_mesh(config.parallel, seed=config.seed, timeout=config.launch.timeout)
    if mesh.device.type == "cpu":
        # Softmax tails over a large codebook are denormal numbers, many times slower on a CPU.
        torch.set_flush_denormal(True)
    task = IBQTask(config, run_dir=run_dir, device=mesh.device)
    try:
        result = fit(task, config=config, run_dir=run_dir)
        task.write_rejects()
    finally:
        task.close()
    if is_main():
        write_folder(task.average.model, folder=run_dir / TOKENIZER_FOLDER)
    return result


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
        self.rejects = Rejects()
        assert isinstance(config.model, IBQConfig)
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
        self.model = _build(config).to(device)
        self.model.to(memory_format=_memory_format(device))  # type: ignore[call-overload]
        self.average = AveragedIBQ(self.model, decay=self.stage.ema_decay)
        self.optimizer = _optimizer(self.model, config=config.optim)
        self.weights = IBQWeights(
            reconstruction=self.stage.reconstruction_weight,
            mse=self.stage.mse_weight,
            quantization=self.stage.quantization_weight,
            commitment=self.stage.commitment,
        )

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

    def train_step(self, step: int) -> dict[str, float]:
        """One update on one global batch, unless the guard refuses it; ``tokens`` counts codes."""
        if step == self.continuous_steps + 1 and self.continuous_steps:
            self._start_codebook()
        with self.clock.marked(Phase.data):
            micro_batches = self.batches.micro_batches(step)
        through = Through.nothing if step <= self.continuous_steps else Through.codebook
        sums = torch.zeros(3, device=self.device)
        used_K = torch.zeros(self.model.config.n_embed, device=self.device)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.clock.marked(Phase.forward_backward):
            for pixels in micro_batches:
                self.clock.beat()
                with self.clock.own():
                    pixels_B3HW = self._to_device(pixels)
                    with self._precision():
                        output = self.model(pixels_B3HW, through=through)
                    losses = ibq_losses(output, pixels_B3HW=pixels_B3HW, weights=self.weights)
                    (losses.total / len(micro_batches)).backward()
                parts = (losses.total, losses.reconstruction, losses.quantization)
                sums += torch.stack([part.detach() for part in parts]) / len(micro_batches)
                if output.quantized is not None:
                    used_K[output.quantized.codes_BHW.flatten()] = 1.0
        total, reconstruction, quantization = (_over_ranks(sums) / world_size()).tolist()
        grad_norm, rate = self._update(step, loss=total)
        pixels = sum(batch.shape[0] * batch.shape[2] * batch.shape[3] for batch in micro_batches)
        codes = torch.tensor(pixels // self.model.config.factor**2, device=self.device)
        return {
            "loss": total,
            "loss_reconstruction": reconstruction,
            "loss_quantization": quantization,
            "codebook_usage": _share_used(_over_ranks(used_K)),
            "rejected": float(_over_ranks(torch.tensor(float(len(self.rejects)))).item()),
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens": float(_over_ranks(codes).item()),
        }

    def _update(self, step: int, *, loss: float) -> tuple[float, float]:
        """Reduce gradients over ranks, clip, step, average; (gradient norm, learning rate). Where
        the guard refuses, weights, average and optimizer stay as they are."""
        trained = [weight for weight in self.model.parameters() if weight.grad is not None]
        with self.clock.marked(Phase.reduction):
            _average_gradients([weight.grad for weight in trained if weight.grad is not None])
        limit = self.config.optim.clip_grad or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        rate = learning_rate(self.config.optim, step=step, steps=self.stage.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        worst_loss, worst_norm = worst_over_ranks([loss, float(norm)])
        if self.guard.accepts(loss=worst_loss, grad_norm=worst_norm):
            with self.clock.marked(Phase.optimizer):
                self.optimizer.step()
                self.average.update(self.model)
        return float(norm), rate

    def _start_codebook(self) -> None:
        """Place the codebook on the latents of the first training samples, alike on all ranks."""
        config = self.model.config
        side = self.data.resolution // config.factor
        count = pictures_needed(num_codes=config.n_embed, codes_per_picture=side * side)
        self.model.eval()
        latents: list[torch.Tensor] = []
        with torch.no_grad():
            for first in range(0, count, self.stage.micro_batch_size):
                self.clock.beat()
                samples = range(first, min(first + self.stage.micro_batch_size, count))
                pixels = np.stack([self.pictures.square(sample) for sample in samples])
                z_BDHW = self.model.latents(self._to_device(pixels))
                latents.append(z_BDHW.permute(0, 2, 3, 1).flatten(0, 2))
        models = [self.model, self.average.model]
        calibrate(
            models,
            latents_ND=torch.cat(latents),
            generator=torch.Generator().manual_seed(self.config.seed),
        )
        if world_size() > 1:
            # The same arithmetic on unlike hosts may differ in the last bit.
            for model in models:
                for weight in model.parameters():
                    dist.broadcast(weight.detach(), src=0)

    # ---------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Reconstruct held-out pictures with the averaged weights; the first ones as a grid."""
        del step
        self.write_rejects()
        if self.validation is None:
            return {}
        model = self.average.model
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        used_K = torch.zeros(model.config.n_embed, device=self.device)
        shown: list[torch.Tensor] = []
        for pixels_B3HW in self._validation_batches():
            codes_BHW = model.encode(pixels_B3HW)
            decoded_B3HW = model.decode(codes_BHW).clamp_(-1, 1)
            used_K += torch.bincount(codes_BHW.flatten(), minlength=used_K.numel())
            totals += _picture_sums(decoded_B3HW, target_B3HW=pixels_B3HW)
            if is_main() and sum(len(rows) for rows in shown) < GRID_PICTURES:
                shown.append(torch.stack([pixels_B3HW, decoded_B3HW], dim=1).cpu())
        used_K = _over_ranks(used_K)
        pictures, error, psnr = _over_ranks(totals).tolist()
        if shown:
            write_grid(torch.cat(shown)[:GRID_PICTURES], path=self.run_dir / RECONSTRUCTIONS)
        if not pictures:
            raise DataError("none of the validation pictures can be used; see " + REJECTS)
        return {
            "loss_reconstruction": error / pictures,
            "psnr": psnr / pictures,
            "codebook_usage": _share_used(used_K),
            "codes_used": float((used_K > 0).sum().item()),
            "codebook_perplexity": _perplexity(used_K),
            "pictures": pictures,
        }

    def _validation_batches(self) -> Iterator[torch.Tensor]:
        """This rank's pictures: every ``ranks``-th of the first ``validation_images``."""
        assert self.validation is not None
        count = min(self.data.validation_images, len(self.validation))
        batch: list[np.ndarray] = []
        for index in range(rank(), count, world_size()):
            self.clock.beat()
            picture = self.validation.centre(index)
            if picture is not None:
                batch.append(picture)
            if len(batch) == self.stage.micro_batch_size:
                yield self._to_device(np.stack(batch))
                batch = []
        if batch:
            yield self._to_device(np.stack(batch))

    def write_rejects(self) -> None:
        """Name the rejected pictures of all ranks in one file."""
        found: list[Mapping[str, str]] = [self.rejects.reasons]
        if world_size() > 1:
            gathered: list[Any] = [None] * world_size()
            dist.all_gather_object(gathered, dict(self.rejects.reasons))
            found = gathered
        if is_main():
            write_rejects(self.run_dir / REJECTS, reasons=found)

    # -------------------------------------------------------------------- state

    def save(self, folder: Path) -> None:
        """Weights, their average and the optimizer; replicas are equal, so one rank writes."""
        if not is_main():
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "pictures": self.pictures.identity,
        }
        torch.save(state, folder / STATE)

    def load(self, folder: Path) -> None:
        """Restore :meth:`save`; the data position is the step number itself.

        Raises:
            DataError: the training pictures are not those of the checkpoint.
            CheckpointError: the state is of another architecture.
        """
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        if state["pictures"] != self.pictures.identity:
            raise DataError(
                f"the pictures under data.paths={list(self.data.paths)} are not those that "
                f"{folder} was trained on (names, sizes, scores or order changed, or what "
                "data.bucket_group=0 takes from stage.micro_batch_size), so their order cannot be "
                "continued; restore them, or start a new run with init_from"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.average.model.load_state_dict(state["average"])
        except RuntimeError as error:
            raise CheckpointError(f"{folder} holds another architecture: {error}") from error
        self.average.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])

    # -------------------------------------------------------------------- parts

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


def _build(config: RunConfig) -> IBQ:
    """The network, drawn from the seed and so alike on every rank."""
    assert isinstance(config.model, IBQConfig)
    model = IBQ(config.model)
    initialize(model, seed=config.seed)
    return model


def _optimizer(model: IBQ, *, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay only on convolutions (never biases, norms or the codebook)."""
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        is_convolution = weight.ndim > 1 and not name.startswith("quantize.")
        (decayed if is_convolution else plain).append(weight)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True
    )


def _memory_format(device: torch.device) -> torch.memory_format:
    """Tensor cores want channels last; on a CPU the plain layout is a little faster."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _over_ranks(values: torch.Tensor) -> torch.Tensor:
    return sum_over(values, dist.group.WORLD if world_size() > 1 else None)


def _average_gradients(gradients: list[torch.Tensor]) -> None:
    """Mean over the ranks, in place, through flat buckets."""
    if world_size() == 1:
        return
    bucket: list[torch.Tensor] = []
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        last = index == len(gradients) - 1
        if last or sum(part.numel() for part in bucket) >= BUCKET_ELEMENTS:
            flat = _over_ranks(torch.cat([part.flatten() for part in bucket]))
            flat /= world_size()
            for part, mean in zip(
                bucket, flat.split([part.numel() for part in bucket]), strict=True
            ):
                part.copy_(mean.view_as(part))
            bucket = []


def _share_used(counts_K: torch.Tensor) -> float:
    return (counts_K > 0).float().mean().item()


def _perplexity(counts_K: torch.Tensor) -> float:
    """Effective number of codes: the exponential of the entropy of their frequencies."""
    share_K = counts_K / counts_K.sum().clamp_min(1)
    return torch.special.entr(share_K).sum().exp().item()


def _picture_sums(decoded_B3HW: torch.Tensor, *, target_B3HW: torch.Tensor) -> torch.Tensor:
    """(pictures, sum of mean absolute differences, sum of PSNR in dB) of one batch."""
    difference_BE = (decoded_B3HW - target_B3HW).double().flatten(1)
    mean_square_B = difference_BE.square().mean(dim=1).clamp_min(1e-12)
    psnr_B = 10 * torch.log10(4 / mean_square_B)  # pixels span 2, from -1 to 1
    count = torch.tensor(float(len(psnr_B)), dtype=torch.float64, device=psnr_B.device)
    return torch.stack([count, difference_BE.abs().mean(dim=1).sum(), psnr_B.sum()])
