"""AdamW through megatron-core (plain or ZeRO-1) and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from emu35.config import EngineConfig, OptimConfig, ParallelConfig, Precision, Schedule
from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate  # noqa: E402


def learning_rate(config: OptimConfig, *, step: int, steps: int) -> float:
    """Learning rate of training step ``step`` (1-based) of ``steps``: linear warm-up to ``lr``,
    then half a cosine (or a constant) down to ``min_lr`` at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule is Schedule.constant:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_lr + (config.lr - config.min_lr) * cosine


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: MegatronOptimizer, *, accepts: Callable[[float], bool]) -> float:
    """mcore's ``optimizer.step()`` with a decision between the gradient norm and the update.

    ``accepts`` gets the norm before clipping. Where it refuses, parameters and optimizer stay as
    they are: clipping by a norm that is not a number would spoil the gradients, and the moments
    with them. Returns the norm.
    """
    overflow = optimizer.prepare_grads()
    assert not overflow, "only fp16 scales its loss"
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    norm = float(optimizer.get_grad_norm())
    if not all(_copies_are_finite(part) for part in parts):
        norm = math.nan
    if not accepts(norm):
        return norm
    for part in parts:
        if not part.is_stub_optimizer and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
    return norm


def _copies_are_finite(part: MegatronOptimizer) -> bool:
    """Whether the gradients of weights that tensor-parallel ranks hold alike (those of norms) are
    finite here: the norm counts those of the first rank only."""
    copies = [
        parameter.grad
        for parameter in part.get_parameters()
        if parameter.grad is not None and not param_is_not_tensor_parallel_duplicate(parameter)
    ]
    if not copies:
        return True
    return bool(torch.stack([copy.sum() for copy in copies]).isfinite().all().item())


class GradientBuckets(DistributedDataParallel):
    """mcore's wrapper with fp32 main gradients; alone, there is nobody to reduce with, and mcore
    would still copy the whole buffer through the collective."""

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
            super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def gather_parameters(self) -> None:
        """With overlap_param_gather the update leaves every rank with its own share, and the rest
        arrives while the next forward of a training step goes on. Whoever reads parameters before
        that calls this (21 % error otherwise, and no message)."""
        if self.ddp_config.overlap_param_gather:
            self.start_param_sync(force_sync=True)

    def wait_for(self, parameter: torch.nn.Parameter) -> None:
        """As the hook before a module's forward does, for one that is read outside of it. A frozen
        one is whole on every rank at all times."""
        if self.ddp_config.overlap_param_gather and parameter.requires_grad:
            self.param_to_bucket_group[parameter].finish_param_sync()


def wrap_and_optimize(
    chunks: list[Emu35Model],
    *,
    optim: OptimConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    precision: Precision,
) -> tuple[list[GradientBuckets], MegatronOptimizer]:
    """Wrap the chunks for data parallelism (fp32 main gradients) and build AdamW over them.

    Norm weights get no weight decay. With ``parallel.zero1`` the optimizer state and the fp32
    main parameters are split over the data-parallel ranks.
    """
    # Alone there is nobody to wait for, and nothing that would take the handles back.
    several = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    overlap_reduce = engine.overlap_grad_reduce and several
    overlap_gather = engine.overlap_param_gather and several
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.zero1,
        overlap_grad_reduce=overlap_reduce,
        overlap_param_gather=overlap_gather,
        check_for_nan_in_grad=False,
        average_in_collective=False,
    )
    wrapped = [
        GradientBuckets(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if overlap_reduce:
        # Reduce at the last micro-batch only.
        no_sync = [chunk.no_sync for chunk in wrapped]
        for chunk in chunks:
            chunk.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]  # type: ignore[assignment]
    bf16 = precision is Precision.bf16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            # 0 would make mcore skip the norm as well, and the norm is always logged.
            clip_grad=optim.clip_grad or math.inf,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=parallel.zero1,
            overlap_param_gather=overlap_gather,
        ),
        [*wrapped],
        use_gloo_process_groups=False,
    )
    for group in optimizer.param_groups:
        # mcore marks the norms' group with a multiplier of 0 and leaves applying it to its own
        # scheduler, which is not used here.
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    if not torch.cuda.is_available():
        # torch's AdamW updates parameter by parameter unless told otherwise; one fused kernel
        # does the same arithmetic several times faster on a CPU.
        for group in optimizer.param_groups:
            group["fused"] = True
    return wrapped, optimizer
