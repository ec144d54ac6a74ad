"""The weights in a form that can generate, whatever the layout they are trained in.

Generation takes a whole model, split by tensor parallelism at most. Where the trainer's own chunk
is one, it is used as it is. Where only the way of computing differs (sequence or context
parallelism), a second model is built whose parameters are the trainer's own memory. Where the
layers lie on several pipeline stages, every rank gets a copy of all of them, refreshed over the
pipeline group in pieces of bounded size, straight from the owner's memory into the receiver's.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from emu35.config import EngineConfig, LMConfig, LMStageConfig, ParallelConfig, RunConfig
from emu35.config.stage import adapters_of
from emu35.model.build import build_model
from emu35.model.lora import attach_adapters
from emu35.model.names import weights_by_name
from emu35.model.transformer import Emu35Model
from emu35.train.passes import Passes


@dataclass(kw_only=True, slots=True)
class WholeModel:
    """``model`` generates with the trainer's weights as of the last :meth:`refresh`; ``copied``
    says whether it holds a copy of them."""

    model: Emu35Model
    copied: bool
    _passes: Passes
    _bucket_elements: int
    _version: int = -1

    @classmethod
    def of(
        cls,
        passes: Passes,
        *,
        config: RunConfig,
        vocabulary_size: int,
        bucket_bytes: int,
    ) -> "WholeModel":
        """Around the chunks that ``passes`` train."""
        parallel, mesh, chunks = config.parallel, passes.mesh, passes.chunks
        copied = mesh.pp_size > 1
        own = not (copied or parallel.sp or mesh.cp_size > 1)
        model = chunks[0] if own else _build(config, vocabulary_size=vocabulary_size)
        element = next(model.parameters()).element_size()
        whole = cls(
            model=model,
            copied=copied,
            _passes=passes,
            _bucket_elements=max(1, bucket_bytes // element),
        )
        if not own and not copied:
            held = _held(chunks)
            for name, parameter in weights_by_name(model).items():
                parameter.data = held[name].data
        return whole

    @torch.no_grad()
    def refresh(self, *, version: int) -> None:
        """Take over the trainer's weights of now, which are of ``version``, the same on every rank;
        a copy of that version is kept as it is. Collective."""
        self._passes.gather_parameters()
        if not self.copied or version == self._version:
            return
        self._version = version
        group = self._passes.mesh.pp_group
        held = _held(self._passes.chunks)
        ranks = dist.get_process_group_ranks(group)
        holders: list[list[str]] = [[] for _ in ranks]
        dist.all_gather_object(holders, list(held), group=group)
        owner = {name: rank for rank, names in zip(ranks, holders, strict=True) for name in names}
        for name, target in sorted(weights_by_name(self.model).items()):
            if name in held and owner[name] == dist.get_rank():
                target.copy_(held[name])
            for piece in target.data.view(-1).split(self._bucket_elements):
                dist.broadcast(piece, src=owner[name], group=group)


def _build(config: RunConfig, *, vocabulary_size: int) -> Emu35Model:
    stage = config.stage
    assert isinstance(stage, LMStageConfig)
    assert isinstance(config.model, LMConfig)
    model = build_model(
        config.model,
        vocabulary_size=vocabulary_size,
        parallel=ParallelConfig(tp=config.parallel.tp),
        engine=EngineConfig(),
        precision=stage.precision,
        whole=True,
    )
    if adapters := adapters_of(stage):
        attach_adapters(model, config=adapters)
    return model.requires_grad_(False).eval()


def _held(chunks: list[Emu35Model]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters under their names in the whole model."""
    return {name: p for chunk in chunks for name, p in weights_by_name(chunk).items()}
