"""Micro-batches through the model by megatron-core's schedule, whatever the layout.

Every stage that trains the language model makes its passes here: forward and backward, or forward
alone, over micro-batches of one shape. What becomes of the hidden states is the caller's
(:data:`MicroBatchLoss`); it is asked on the last pipeline stage only.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from emu35.config import RunConfig
from emu35.config.stage import adapts_noisy_only
from emu35.data.batch import Batch
from emu35.model.context import AttentionContext
from emu35.model.context_parallel import split_sequence
from emu35.model.transformer import Emu35Model
from emu35.parallel import cpu
from emu35.parallel.mesh import Mesh
from emu35.train.clock import Phase, StepClock
from emu35.train.objective import BatchMask, MicroBatch, mask_of
from emu35.train.optim import GradientBuckets

cpu.install()

from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

Sums: TypeAlias = dict[str, torch.Tensor]

MicroBatchLoss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Sums]]
"""(hidden states [S, B, H] of the last stage, micro-batch) -> its part of the loss, already divided
by whatever is counted over the global batch, and tensors to report."""


class Passes:
    """The model of this rank and how micro-batches go through it.

    Args:
        chunks: the model, ``wrapped`` for data parallelism.
        clock: told that something goes on, and of the reductions.
        batch_mask: which keys the rows of a batch see.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        mesh: Mesh,
        chunks: list[Emu35Model],
        wrapped: list[GradientBuckets],
        clock: StepClock,
        batch_mask: BatchMask = mask_of,
    ) -> None:
        self.mesh, self.chunks, self.wrapped, self.clock = mesh, chunks, wrapped, clock
        self._cp_comm_type = config.parallel.cp_comm_type
        self._batch_mask = batch_mask
        self._noisy_only = adapts_noisy_only(config.stage)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = partial(_finalize_gradients, clock=clock)

    @property
    def group_size(self) -> int:
        """Micro-batches of a pass come in multiples of this."""
        return self.mesh.pp_size if len(self.wrapped) > 1 else 1

    def micro_batch(
        self, batch: Batch, *, weights_TBS: torch.Tensor, scales_T: torch.Tensor
    ) -> MicroBatch:
        """The columns of ``batch`` that this rank works on. Dealt out here, once a micro-batch,
        and not in the forward that every virtual pipeline stage calls.

        Args:
            weights_TBS: label weights by term of the loss, raw.
            scales_T: what each term is multiplied by.
        """
        mask, split = self._batch_mask(batch), None
        inside = batch.document_start < batch.tokens.shape[1]
        copied = 0 if batch.noisy is None else int((batch.noisy >= 0).sum())
        pairs = int(mask.visible_keys().sum())
        if self.mesh.cp_size > 1:
            group, device = self.mesh.cp_group, self.mesh.device
            split = split_sequence(mask, kind=self._cp_comm_type, group=group, device=device)
            batch, mask = batch.take(split.rows_S), split.local_mask(mask)
            weights_TBS = weights_TBS.index_select(2, split.rows_S)
        return MicroBatch(
            batch=batch,
            weights_TBS=weights_TBS,
            normalised_BS=(weights_TBS * scales_T[:, None, None]).sum(0),
            mask=mask,
            split=split,
            tokens=int(inside.sum()) - copied,
            copied=copied,
            visible_pairs=pairs,
        ).on(self.mesh.device)

    def run(
        self, micro_batches: Sequence[MicroBatch], *, loss: MicroBatchLoss, forward_only: bool
    ) -> list[Sums]:
        """All of them through the schedule, gradients reduced at the end; what ``loss`` reported of
        each, in order, on the last pipeline stage (elsewhere nothing)."""
        first = micro_batches[0]
        sequence_length = first.batch.tokens.shape[1] * self.mesh.cp_size
        iterators = [self._deal(micro_batches) for _ in self.wrapped]
        interleaved = len(self.wrapped) > 1
        model: Any = self.wrapped if interleaved else self.wrapped[0]
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss=loss),
            data_iterator=iterators if interleaved else iterators[0],
            model=model,
            num_microbatches=len(micro_batches),
            seq_length=sequence_length,
            micro_batch_size=first.batch.tokens.shape[0],
            forward_only=forward_only,
        )

    def gather_parameters(self) -> None:
        """Make every parameter whole; to be called before anything but a training step reads it."""
        for chunk in self.wrapped:
            chunk.gather_parameters()

    def _deal(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches; asking for the next one is a sign of progress."""
        for micro_batch in micro_batches:
            self.clock.beat()
            yield micro_batch

    def _forward(
        self, iterator: Iterator[MicroBatch], chunk: Any, *, loss: MicroBatchLoss
    ) -> tuple[torch.Tensor, Any]:
        micro_batch = next(iterator)
        batch, split = micro_batch.batch, micro_batch.split
        context = AttentionContext(
            positions_BS=batch.positions,
            mask=micro_batch.mask,
            split=split,
            adapted_BS=self._adapted(batch),
        )
        with cpu.without_shim(), self.clock.own():
            hidden_SBH = chunk(batch.tokens, context=context)
        if chunk.module.post_process:
            # The loss multiplies by it without going through its module.
            chunk.wait_for(chunk.module.output_layer.weight)
        return hidden_SBH, partial(_loss, loss=loss, micro_batch=micro_batch)

    def _adapted(self, batch: Batch) -> torch.Tensor | None:
        """Rows of noisy copies, where adapters want to know them."""
        if not self._noisy_only:
            return None
        return None if batch.noisy is None else batch.noisy >= 0


def _loss(
    hidden_SBH: torch.Tensor, *, loss: MicroBatchLoss, micro_batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, Sums]:
    value, sums = loss(hidden_SBH, micro_batch)
    # mcore divides by this count at the end; the loss is already normalised.
    no_tokens = torch.zeros([], dtype=torch.int, device=value.device)
    return value, no_tokens, sums


def _finalize_gradients(
    chunks: Any, num_tokens: object = None, *, clock: StepClock, **groups: Any
) -> None:
    """mcore's reductions over the layout (data parallel, q/k norms, embeddings) without its
    division by the token count."""
    del num_tokens
    with clock.marked(Phase.reduction):
        finalize_model_grads(chunks, None, **groups)
