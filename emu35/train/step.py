"""One training step of the language model, through megatron-core's schedule.

The loss of a global batch is sum(weight x cross-entropy) / sum(weight), both sums over every
token of every rank, or several such terms, each with a share. The denominators are known before
the first forward (the micro-batches are at hand), so each micro-batch already contributes its final
share; nothing is averaged afterwards, and the result depends neither on the number of ranks or
micro-batches nor on the packing.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from emu35.checkpoint import sharded
from emu35.checkpoint.staged import StateWrite
from emu35.config import LMConfig, LMStageConfig, RunConfig, TokenDataConfig
from emu35.config.data import Damaged
from emu35.config.stage import adapters_of
from emu35.data.batch import Batch, BatchChange, as_it_is
from emu35.data.loader import LOADER_FILE, TokenLoader, ValidationSet
from emu35.errors import DataError
from emu35.model.flops import step_flops
from emu35.model.logits import weighted_cross_entropy
from emu35.model.shapes import adapter_count
from emu35.model.transformer import Emu35Model
from emu35.parallel.collectives import barrier, is_main, sum_over, worst_over_ranks
from emu35.parallel.mesh import Mesh
from emu35.train.clock import Phase, StepClock
from emu35.train.feed import Feed
from emu35.train.guard import Guard
from emu35.train.held_out import HeldOut, with_labels
from emu35.train.measure import FLOPS
from emu35.train.objective import (
    BatchMask,
    LossReport,
    MicroBatch,
    Tally,
    Term,
    mask_of,
    nothing,
)
from emu35.train.optim import learning_rate, set_learning_rate, update, wrap_and_optimize
from emu35.train.passes import Passes, Sums


class LMTask:
    """What pretraining and fine-tuning do at every step; the trainer drives it.

    Args:
        config: the whole run.
        mesh: where this rank stands.
        chunks: this rank's model, initialised or loaded.
        loader: the training data, already sliced to this data-parallel rank.
        validation: the validation sets by name.
        terms: of the training loss; with two or more, each is reported.
        sources: names of the loader's sources, in the order in which batches number them; with
            two or more, losses and shares by source are reported.
        batch_mask: which keys the rows of a batch see.
        finish: what is done to a training batch, on every rank of the model alike, before the
            model sees it.
        tally: what is counted in a batch and reported, summed over the global batch.
        start_weights: puts other weights than the initial ones into ``chunks``; called when the
            run begins, not when it resumes.

    Raises:
        DataError: a validation set has no label that counts.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        mesh: Mesh,
        chunks: list[Emu35Model],
        loader: TokenLoader,
        validation: dict[str, HeldOut],
        terms: Sequence[Term],
        sources: Sequence[str] = (),
        batch_mask: BatchMask = mask_of,
        finish: BatchChange = as_it_is,
        tally: Tally = nothing,
        start_weights: Callable[[list[Emu35Model]], object] | None = None,
    ) -> None:
        assert isinstance(config.stage, LMStageConfig)
        self.config, self.stage, self.mesh = config, config.stage, mesh
        self.guard = Guard(config.guard)
        # Pipeline stages do unlike work: embedding here, logits there.
        self.clock = StepClock(device=mesh.device, peers=mesh.pp_rank)
        self.loader, self.terms = loader, tuple(terms)
        self.feed = Feed(loader, mesh=mesh)
        self.validation = with_labels(validation, mesh=mesh)
        self.chunks, self.start_weights = chunks, start_weights
        self.finish, self.tally = finish, tally
        self.sources = sources if len(sources) > 1 else ()
        self.wrapped, self.optimizer = wrap_and_optimize(
            chunks,
            optim=config.optim,
            parallel=config.parallel,
            engine=config.engine,
            precision=config.stage.precision,
        )
        self.passes = Passes(
            config=config,
            mesh=mesh,
            chunks=chunks,
            wrapped=self.wrapped,
            clock=self.clock,
            batch_mask=batch_mask,
        )

    @property
    def finished(self) -> str | None:
        """Never before ``stage.steps``."""
        return None

    def start(self) -> None:
        """The weights that ``stage.init_from`` names, if it names any."""
        if self.start_weights is not None:
            self.start_weights(self.chunks)
            # The optimizer made its fp32 copies when it was built.
            self.optimizer.reload_model_params()

    def train_step(self, step: int) -> dict[str, float]:
        """Forward, backward and update for one global batch; returns metrics of the whole world.

        ``tokens`` counts document tokens (no padding), ``loss`` is the weighted mean, and
        ``data/...`` what the loader has counted up to this step. A step that the guard refuses
        updates nothing; its data count as read.

        Raises:
            DataError: no token of the global batch has a weight in a term that is required.
        """
        with self.clock.marked(Phase.data):
            batches = [self.finish(batch) for batch in self.feed.next_step()]
        micro_batches, weights = self._normalise(batches, terms=self.terms)
        for term, weight in zip(self.terms, weights, strict=True):
            if term.required and term.share > 0 and not weight:
                raise DataError(_explain_no_weight(step, term=term.name))
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.clock.marked(Phase.forward_backward):
            report = self._run(micro_batches, forward_only=False, sources=len(self.sources))
        rate = learning_rate(self.config.optim, step=step, steps=self.stage.steps)
        set_learning_rate(self.optimizer, rate)
        with self.clock.marked(Phase.optimizer):
            grad_norm = update(self.optimizer, accepts=partial(self._accepts, report.weighted))
        return {
            **report.metrics(
                terms=[term.name for term in self.terms] if len(self.terms) > 1 else (),
                sources=self.sources,
            ),
            "lr": rate,
            "grad_norm": grad_norm,
            **self._tallied(batches),
            **{f"data/{name}": value for name, value in self.loader.counts().items()},
            **self._damaged(),
            **self._sizes(micro_batches),
        }

    def _accepts(self, loss: float, grad_norm: float) -> bool:
        """The guard's word, the same on every rank: replicas hold equal numbers unless one of them
        is broken, and then the worst counts."""
        loss, grad_norm = worst_over_ranks([loss, grad_norm])
        return self.guard.accepts(loss=loss, grad_norm=grad_norm)

    def _tallied(self, batches: Sequence[Batch]) -> dict[str, float]:
        counts = [self.tally(batch) for batch in batches]
        names = list(counts[0])
        if not names:
            return {}
        own = [[count[name] for name in names] for count in counts]
        sums = torch.tensor(own, dtype=torch.float64, device=self.mesh.device).sum(0)
        return dict(zip(names, sum_over(sums, self.mesh.dp_group).tolist(), strict=True))

    def _damaged(self) -> dict[str, float]:
        """Documents that ranks have come upon damaged so far, where those are left out."""
        data = self.config.data
        if not isinstance(data, TokenDataConfig) or data.damaged is Damaged.refuse:
            return {}
        own = torch.tensor(float(self.loader.damaged_documents), device=self.mesh.device)
        return {"damaged_documents": float(sum_over(own, self.mesh.dp_group))}

    def _sizes(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Document tokens of the global batch, and the model FLOPs they cost."""
        assert isinstance(self.config.model, LMConfig)
        own = [[item.tokens, item.copied, item.visible_pairs] for item in micro_batches]
        sums = torch.tensor(own, device=self.mesh.device).sum(0)
        tokens, copied, pairs = sum_over(sums, self.mesh.dp_group).tolist()
        lora = adapters_of(self.stage)
        flops = step_flops(
            self.config.model,
            vocabulary_size=self.chunks[0].vocabulary_size,
            tokens=tokens + copied,
            visible_pairs=pairs,
            adapters=adapter_count(self.config.model, lora=lora) if lora else None,
        )
        return {"tokens": float(tokens), FLOPS: flops}

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Mean cross-entropy (nats a token) over its own modality, of every validation set that
        has its turn after ``step``."""
        metrics: dict[str, float] = {}
        self.passes.gather_parameters()
        for chunk in self.wrapped:
            chunk.eval()
        for name, held_out in self.validation.items():
            if not held_out.has_turn(step, stage=self.stage):
                continue
            total, total_weight = 0.0, 0.0
            term = Term(name=name, token_weights=held_out.token_weights)
            for batches in self._groups(held_out.documents):
                finished = map(held_out.finish, batches)
                micro_batches, (weight,) = self._normalise(finished, terms=[term])
                total += self._run(micro_batches, forward_only=True).weighted * weight
                total_weight += weight
            metrics[f"{name}/loss"] = total / total_weight
        for chunk in self.wrapped:
            chunk.train()
        return metrics

    def save(self, folder: Path) -> StateWrite:
        """Data position, and a plan for model and optimizer; every rank calls it."""
        self.passes.gather_parameters()
        state = sharded.plan_save(folder, chunks=self.chunks, optimizer=self.optimizer)
        if is_main():
            position = json.dumps(self.loader.state_dict(), indent=1)
            (folder / LOADER_FILE).write_text(position, encoding="utf-8")
        return state

    def load(self, folder: Path) -> None:
        """Undo ``save``, in this or another layout."""
        sharded.load(folder, chunks=self.chunks, optimizer=self.optimizer)
        state = json.loads((folder / LOADER_FILE).read_text(encoding="utf-8"))
        self.loader.load_state_dict(state)
        barrier()

    def _normalise(
        self, batches: Iterable[Batch], *, terms: Sequence[Term]
    ) -> tuple[list[MicroBatch], list[float]]:
        """Micro-batches with weights that sum, term by term, to its share over all ranks; and what
        the weights of each term summed to."""
        pairs = [
            (batch, torch.stack([term.token_weights(batch) for term in terms])) for batch in batches
        ]
        totals_T = torch.stack([weights.double().sum((1, 2)) for _, weights in pairs]).sum(0)
        totals = sum_over(totals_T.to(self.mesh.device), self.mesh.dp_group).tolist()
        scales_T = torch.tensor(
            [term.share / max(total, 1e-30) for term, total in zip(terms, totals, strict=True)]
        )
        return [
            self.passes.micro_batch(batch, weights_TBS=weights_TBS, scales_T=scales_T)
            for batch, weights_TBS in pairs
        ], totals

    def _groups(self, documents: ValidationSet) -> Iterator[list[Batch]]:
        """Batches as the schedule takes them: one by one, or in groups of the pipeline's stages
        where it interleaves them. A last group is filled up with rows without labels."""
        size = self.passes.group_size
        group: list[Batch] = []
        for batch in documents:
            group.append(batch)
            if len(group) == size:
                yield group
                group = []
        if group:
            last = group[-1]
            empty = replace(last, label_valid=torch.zeros_like(last.label_valid))
            yield group + [empty] * (size - len(group))

    def _run(
        self, micro_batches: list[MicroBatch], *, forward_only: bool, sources: int = 0
    ) -> LossReport:
        """All micro-batches through mcore's schedule; the report, with as many of the mixture's
        ``sources`` as asked for, is summed over the world."""
        first = micro_batches[0]
        reports = self.passes.run(
            micro_batches, loss=partial(self._loss, sources=sources), forward_only=forward_only
        )
        terms = len(first.weights_TBS)
        size = LossReport.size(terms=terms, sources=sources)
        zero = torch.zeros(size, dtype=torch.float64, device=self.mesh.device)
        vector = torch.stack([item["sums"] for item in reports]).sum(0) if reports else zero
        # Only the last pipeline stage has a loss; the sum over stages hands it to the others.
        sum_over(vector, self.mesh.dp_cp_group)
        sum_over(vector, self.mesh.pp_group)
        return LossReport.from_vector(vector, terms=terms)

    def _loss(
        self, hidden_SBH: torch.Tensor, micro_batch: MicroBatch, *, sources: int
    ) -> tuple[torch.Tensor, Sums]:
        loss, losses_BS = weighted_cross_entropy(
            self.chunks[-1],
            hidden_SBH=hidden_SBH,
            labels_BS=micro_batch.batch.labels,
            weights_BS=micro_batch.normalised_BS,
            chunk=self.stage.loss_chunk,
        )
        sums = LossReport.of(
            loss=loss, losses_BS=losses_BS, micro_batch=micro_batch, sources=sources
        )
        return loss, {"sums": sums}


def _explain_no_weight(step: int, *, term: str) -> str:
    return (
        f"no token of step {step} has a loss weight (of {term}), so there is nothing to learn "
        "from: either stage.loss_weights gives 0 to every modality in these documents (raise "
        "one), or the stage learns responses only, as stage=sft does, and none of these documents "
        "opens a response (use documents that do, stage=pretrain, or for stage=dida "
        "stage.responses_only=false)"
    )
