"""The CPU shim: the only file of emu35 that patches torch or megatron-core.

megatron-core 0.16.1 asks for CUDA in places where a CPU would do. ``install()`` answers each of
them when, and only when, no CUDA device is present, so that the code path on a laptop is the one
on a cluster with gloo in place of NCCL. It must run before megatron.core is imported; every
module of emu35 that imports megatron.core calls it first. Re-check each patch (the comment names
the line of megatron-core it answers) whenever the pinned version moves.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []
_mended: list[bool] = []


def install() -> None:
    """Import megatron-core, usable without CUDA; where CUDA is present, only mend what is wrong
    without transformer-engine."""
    if not _mended:
        _mended.append(True)
        if torch.cuda.is_available():
            with _wandb_unasked():
                import megatron.core  # noqa: F401
        else:
            _install_on_cpu()
        _patch_output_recomputation()


def _install_on_cpu() -> None:
    # A laptop lacks TE and Apex by design; mcore says so at every import of every process.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex)", module="megatron")
    _patch_cuda_module()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
    with _wandb_unasked(), _decorators_without_compiler():
        import megatron.core  # noqa: F401
    _patch_rng_tracker()
    _patch_pipeline_messages()
    _patch_gradient_norm()


@contextmanager
def _wandb_unasked() -> Iterator[None]:
    """megatron.core imports wandb for metrics of its own inference (timers.py:13), which emu35 does
    not use: a third of the time that a process takes to start."""
    loaded = sys.modules.get("wandb")
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if loaded is not None:
            sys.modules["wandb"] = loaded


@contextmanager
def _decorators_without_compiler() -> Iterator[None]:
    """megatron.core decorates its fused functions with torch.compile (jit.py), which imports the
    compiler: another quarter of a start. On a CPU they run as they are written."""
    compiler = torch.compile
    torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = compiler


def without_shim() -> AbstractContextManager[object]:
    """For code that asks for nothing a CPU lacks: torch's calls go straight through, as they do
    with CUDA, instead of past :class:`_CudaMeansCpu` one by one."""
    return torch._C.DisableTorchFunction() if _installed else nullcontext()


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` as the CPU and lets CPU tensors pass mcore's type-name tests.

    Answers the literals in pipeline_parallel/schedules.py (``total_num_tokens``),
    optimizer/clip_grads.py and optimizer/optimizer.py, and the comparisons with
    ``torch.cuda.FloatTensor`` in optimizer/optimizer.py and optimizer/distrib_optimizer.py.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args)


class _NoStream:
    """A CUDA stream or event on a machine that has neither: everything is already done."""

    device_index = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *args: object) -> None:
        del args

    def record_event(self, *args: object) -> "_NoStream":
        del args
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *args: object) -> None:
        del args

    wait_stream = wait_event = record = wait = synchronize = _nothing


def _make_nothing() -> Callable[..., None]:
    """A new function a use: torch._dynamo, which optimizers import, keeps a table of torch's
    functions and refuses one object under two names."""
    return lambda *args, **kwargs: None


def _patch_cuda_module() -> None:
    """torch.cuda attributes that mcore reads while building, seeding and saving."""

    replacements: dict[str, Any] = {
        # "device=torch.cuda.current_device()" throughout: a torch.device works there as well.
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _make_nothing(),
        "synchronize": _make_nothing(),
        "empty_cache": _make_nothing(),
        # CudaRNGStatesTracker.add (tensor_parallel/random.py:235)
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        # DistributedDataParallel and the asynchronous checkpoint writer
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda stream: _NoStream(),
        "current_stream": lambda *args, **kwargs: _NoStream(),
        "default_stream": lambda *args, **kwargs: _NoStream(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _make_nothing())


def _patch_rng_tracker() -> None:
    """The dropout RNG tracker (tensor_parallel/random.py:41 and :72) reads CUDA generators."""
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        del args, kwargs
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
        del args, kwargs
        torch.set_rng_state(new_state)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    # The tracker warns whenever the CPU state moved inside it, which is now its very purpose.
    logging.getLogger(mcore_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _patch_pipeline_messages() -> None:
    """gloo pairs messages by peer and tag. With two pipeline stages and virtual stages, previous
    and next are the same peer and untagged messages mispair: gradients come out wrong without any
    error (pipeline_parallel/p2p_communication.py, ``_p2p_ops``). One tag a direction is exact."""
    import megatron.core.pipeline_parallel.p2p_communication as p2p

    forward_tag, backward_tag = 1, 2

    def tagged(
        *,
        tensor_send_prev: torch.Tensor | None,
        tensor_recv_prev: torch.Tensor | None,
        tensor_send_next: torch.Tensor | None,
        tensor_recv_next: torch.Tensor | None,
        group: dist.ProcessGroup,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> dict[str, Any]:
        requests: dict[str, Any] = {}
        if tensor_recv_prev is not None:
            requests["recv_prev"] = dist.irecv(
                tensor_recv_prev, prev_pipeline_rank, group, tag=forward_tag
            )
        if tensor_recv_next is not None:
            requests["recv_next"] = dist.irecv(
                tensor_recv_next, next_pipeline_rank, group, tag=backward_tag
            )
        if tensor_send_next is not None:
            requests["send_next"] = dist.isend(
                tensor_send_next.contiguous(), next_pipeline_rank, group, tag=forward_tag
            )
        if tensor_send_prev is not None:
            requests["send_prev"] = dist.isend(
                tensor_send_prev.contiguous(), prev_pipeline_rank, group, tag=backward_tag
            )
        return requests

    p2p._p2p_ops = tagged
    p2p._batched_p2p_ops = lambda **kwargs: list(tagged(**kwargs).values())


def _patch_output_recomputation() -> None:
    """Recomputing norms (tensor_parallel/random.py:633) takes the default ``fp8=False`` for FP8 and
    then misses classes of transformer-engine that were never imported."""
    import megatron.core.tensor_parallel.random as mcore_random

    if mcore_random.HAVE_TE:
        return
    init = mcore_random.CheckpointWithoutOutput.__init__

    def without_fp8(self: Any, fp8: bool = False) -> None:
        init(self, fp8=fp8)
        self.fp8 = False

    patched: Any = mcore_random.CheckpointWithoutOutput
    patched.__init__ = without_fp8


def _patch_gradient_norm() -> None:
    """Without TE and Apex, optimizer/clip_grads.py:40 falls back to one small call a parameter and
    copies every gradient to scale it; torch has both for whole lists."""
    from megatron.core.optimizer import clip_grads

    lists: Any = torch  # whose operations on lists have no public names

    def norm(
        chunk_size: int,
        overflow: torch.Tensor,
        tensor_lists: Sequence[Sequence[torch.Tensor]],
        per_tensor: bool,
    ) -> tuple[torch.Tensor, None]:
        del chunk_size, overflow, per_tensor
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        return torch.nn.utils.get_total_norm(tensors).view(1), None

    def scale(
        chunk_size: int,
        overflow: torch.Tensor,
        tensor_lists: Sequence[Sequence[torch.Tensor]],
        factor: float,
    ) -> None:
        del chunk_size, overflow
        sources, targets = tensor_lists
        if any(source is not target for source, target in zip(sources, targets, strict=True)):
            lists._foreach_copy_(targets, sources)
        lists._foreach_mul_(targets, factor)

    patched: Any = clip_grads
    patched.l2_norm_impl = norm
    patched.multi_tensor_scale_impl = scale
