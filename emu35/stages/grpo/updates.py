"""From scored rollouts to new weights: replay, reference, updates.

The trainer replays every sampled token under the very policy that drew it (its legal set, what
top-k and top-p left of it, temperature, guidance) with the weights it was drawn with. What it finds
is the denominator of the ratios of the updates that follow, and its distance from what the engine
said is the drift between the two.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from emu35.config import GRPOConfig, RunConfig
from emu35.config.grpo import Reference
from emu35.inference.sampler import guide_hidden
from emu35.model.logits import hidden_for_projection
from emu35.model.lora import without_adapters
from emu35.model.names import base_weights
from emu35.model.policy import PolicyLogprobs, policy_logprobs
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import sum_over, worst_over_ranks
from emu35.parallel.mesh import Mesh
from emu35.stages.grpo.objective import (
    PolicyReport,
    answer_sums,
    importance_weights,
    largest_ratios,
    token_losses,
)
from emu35.stages.grpo.rows import PolicyBatch
from emu35.tokens.serialize import Modality
from emu35.train.clock import Phase, StepClock
from emu35.train.guard import Guard
from emu35.train.objective import MicroBatch
from emu35.train.optim import set_learning_rate, update, wrap_and_optimize
from emu35.train.passes import Passes, Sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """|log pi_trainer - log pi_rollout| over the sampled tokens that a step learns from (nats), and
    how many there are."""

    mean: float
    largest: float
    tokens: int


@dataclass(kw_only=True, slots=True)
class FrozenCopy:
    """The weights as they were when it was made, beside the model that goes on changing."""

    _chunks: list[Emu35Model]
    _kept: list[dict[str, torch.Tensor]] = field(default_factory=list[dict[str, torch.Tensor]])

    def take(self) -> None:
        """Copy the weights of now."""
        self._kept = [
            {name: p.detach().clone() for name, p in base_weights(chunk).items()}
            for chunk in self._chunks
        ]

    def swap(self) -> None:
        """Exchange the copy with the model's weights; twice is as it was."""
        for chunk, kept in zip(self._chunks, self._kept, strict=True):
            for name, parameter in base_weights(chunk).items():
                parameter.data, kept[name] = kept[name], parameter.data


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One update over all its micro-batches and ranks: what it did or would have done, its gradient
    norm before clipping, and why it was ``refused``; None: it was made."""

    report: PolicyReport
    grad_norm: float
    refused: str | None


class PolicyUpdates:
    """The trained model of this rank, its optimizer, and the passes of a step.

    Args:
        chunks: this rank's model, initialised or loaded.
        guard: asked before every update.

    Attributes:
        version: of the weights; another number whenever they have changed.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        mesh: Mesh,
        chunks: list[Emu35Model],
        guard: Guard,
        clock: StepClock,
    ) -> None:
        assert isinstance(config.stage, GRPOConfig)
        self.version = 0
        self.stage: GRPOConfig = config.stage
        self.mesh, self.chunks = mesh, chunks
        self._guard, self._clock = guard, clock
        self.wrapped, self.optimizer = wrap_and_optimize(
            chunks,
            optim=config.optim,
            parallel=config.parallel,
            engine=config.engine,
            precision=config.stage.precision,
        )
        self.passes = Passes(
            config=config, mesh=mesh, chunks=chunks, wrapped=self.wrapped, clock=clock
        )
        self.reference = FrozenCopy(_chunks=chunks)

    def micro_batches(self, batches: Sequence[PolicyBatch]) -> list[MicroBatch]:
        """What this rank computes of each."""
        one = torch.ones(1)
        return [
            self.passes.micro_batch(
                batch, weights_TBS=(batch.weight * batch.sampled)[None], scales_T=one
            )
            for batch in batches
        ]

    @torch.no_grad()
    def replay(self, micro_batches: Sequence[MicroBatch]) -> Drift:
        """Find the log-probability of every sampled token with the weights of now, and how far it
        is from what the rollout engine said. Collective."""
        self._look(micro_batches, self._note_old)
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        largest = 0.0
        for batch in map(_policy_batch, micro_batches):
            if batch.known.old_N is None:  # another pipeline stage knows
                continue
            off_N = batch.known.old_N - batch.of("behaviour", batch.chosen_N)
            sums += torch.stack([off_N.abs().double().sum(), off_N.new_tensor(len(off_N)).double()])
            largest = max([largest, *off_N.abs().topk(min(1, len(off_N))).values.tolist()])
            batch.known.correction_N = self._correction(batch, off_N)
        sum_over(sums, self.mesh.dp_cp_group)
        sum_over(sums, self.mesh.pp_group)
        (largest,) = worst_over_ranks([largest])
        total, tokens = sums.tolist()
        return Drift(mean=total / max(tokens, 1.0), largest=largest, tokens=int(tokens))

    @torch.no_grad()
    def ask_reference(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Find the unfiltered log-probabilities of the reference, where a loss needs them."""
        if self.stage.loss.kl_weight == 0 or self.stage.reference is Reference.none:
            return
        with ExitStack() as stack:
            if self.stage.reference is Reference.adapter_off:
                for chunk in self.chunks:
                    stack.enter_context(without_adapters(chunk))
            else:
                self.passes.gather_parameters()
                self.reference.swap()
                stack.callback(self.reference.swap)
            self._look(micro_batches, self._note_reference)

    def update(self, micro_batches: Sequence[MicroBatch], *, rate: float) -> Update:
        """Forward, backward and, where the guard permits, an update. Collective. The guard is to be
        told of all refusals of the step in the end."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self._clock.marked(Phase.forward_backward):
            reports = self.passes.run(micro_batches, loss=self._loss, forward_only=False)
        zero = torch.zeros(PolicyReport.size(), dtype=torch.float64, device=self.mesh.device)
        vector = torch.stack([item["sums"] for item in reports]).sum(0) if reports else zero
        sum_over(vector, self.mesh.dp_cp_group)
        sum_over(vector, self.mesh.pp_group)
        largest = torch.stack([item["largest"] for item in reports]).amax(0) if reports else None
        ratios = worst_over_ranks([0.0, 0.0] if largest is None else largest.tolist())
        report = PolicyReport.from_vector(vector, largest=ratios)
        loss, refused = report.metrics()["loss"], None

        def accepts(grad_norm: float) -> bool:
            nonlocal refused
            worst_loss, worst_norm = worst_over_ranks([loss, grad_norm])
            refused = self._guard.judge(loss=worst_loss, grad_norm=worst_norm)
            return refused is None

        set_learning_rate(self.optimizer, rate)
        with self._clock.marked(Phase.optimizer):
            norm = update(self.optimizer, accepts=accepts)
        self.version += refused is None
        return Update(report=report, grad_norm=norm, refused=refused)

    def _look(self, micro_batches: Sequence[MicroBatch], note: Any) -> None:
        """A pass without gradients and without dropout."""
        self.passes.gather_parameters()
        for chunk in self.wrapped:
            chunk.eval()
        self.passes.run(micro_batches, loss=note, forward_only=True)
        for chunk in self.wrapped:
            chunk.train()

    def _note_old(
        self, hidden_SBH: torch.Tensor, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, Sums]:
        _policy_batch(micro_batch).known.old_N = self._replayed(hidden_SBH, micro_batch).chosen_N
        return hidden_SBH.new_zeros(()), {}

    def _note_reference(
        self, hidden_SBH: torch.Tensor, micro_batch: MicroBatch
    ) -> tuple[torch.Tensor, Sums]:
        found = self._replayed(hidden_SBH, micro_batch)
        _policy_batch(micro_batch).known.reference_N = found.plain_N
        return hidden_SBH.new_zeros(()), {}

    def _replayed(self, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> PolicyLogprobs:
        """The sampled tokens of the columns of this rank."""
        batch, model = _policy_batch(micro_batch), self.chunks[-1]
        hidden_SBH = hidden_for_projection(model, hidden_SBH)
        chosen_N = batch.chosen_N
        hidden_NH = hidden_SBH.flatten(0, 1)[chosen_N]
        guided_NH = None
        if batch.guided:
            whole = hidden_SBH
            if micro_batch.split is not None:
                whole = micro_batch.split.gather_rows(hidden_SBH)
            rows = batch.tokens.shape[0]
            partner_N = batch.of("partner", chosen_N) * rows + chosen_N % rows
            guided_NH = guide_hidden(
                hidden_NH,
                unconditional_NH=whole.flatten(0, 1)[partner_N],
                scale_N1=batch.of("guidance", chosen_N)[:, None],
            )
        return policy_logprobs(
            model,
            hidden_NH=hidden_NH,
            guided_NH=guided_NH,
            choices=batch.choices(chosen_N),
            chunk=self.stage.loss_chunk,
        )

    def _loss(self, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, Sums]:
        batch = _policy_batch(micro_batch)
        found = self._replayed(hidden_SBH, micro_batch)
        chosen_N, known = batch.chosen_N, batch.known
        assert known.old_N is not None
        assert known.correction_N is not None
        losses = token_losses(
            found.chosen_N,
            old_N=known.old_N,
            plain_N=found.plain_N,
            reference_N=known.reference_N,
            advantage_N=batch.of("advantage", chosen_N),
            correction_N=known.correction_N,
            entropy_N=found.entropy_N,
            config=self.stage.loss,
        )
        weight_N = batch.of("weight", chosen_N)
        visual_N = batch.of("label_modality", chosen_N) == Modality.VISUAL
        sums = PolicyReport.of(losses, weight_N=weight_N, visual_N=visual_N)
        largest = largest_ratios(losses, visual_N=visual_N)
        return losses.total(weight_N), {"sums": sums, "largest": largest}

    def _correction(self, batch: PolicyBatch, off_N: torch.Tensor) -> torch.Tensor:
        """Importance weights of the sampled tokens, ``off_N`` being log pi_trainer - log
        pi_rollout. An answer may lie on several context-parallel ranks."""
        answer_N = batch.of("answer", batch.chosen_N)
        sums_A = answer_sums(off_N, answer_N=answer_N, answers=batch.answers)
        sum_over(sums_A, self.mesh.cp_group)
        return importance_weights(off_N, answer_N=answer_N, sums_A=sums_A, config=self.stage.drift)


def _policy_batch(micro_batch: MicroBatch) -> PolicyBatch:
    batch = micro_batch.batch
    assert isinstance(batch, PolicyBatch)
    return batch
