"""How the model is laid out over ranks; data parallelism takes what is left."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least


class CPCommType(StrEnum):
    """How context-parallel ranks exchange, in megatron-core's words: all keys and values to all
    ranks, or rows of all heads against all rows of some heads (DeepSpeed-Ulysses)."""

    all_gather = "all_gather"
    a2a = "a2a"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Tensor (``tp``, with sequence parallelism ``sp``), pipeline (``pp``, ``vpp`` virtual stages
    a rank), context (``cp``, exchanging by ``cp_comm_type``) and ZeRO-1 data parallelism.
    dp = world size / (tp * pp * cp).

    ``pp_layers`` gives each pipeline stage its own number of layers, in the order of the layers
    (pp x vpp numbers: the first of every rank, then the second of every rank); empty: all alike.
    The embedding and the output layer are worth a few layers at a large vocabulary, so the first
    and the last stage do better with fewer.
    """

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_comm_type: CPCommType = CPCommType.all_gather
    zero1: bool = False
    pp_layers: list[int] = field(default_factory=list[int])

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each of the pp x vpp stages, in the order of the layers."""
        stages = self.pp * self.vpp
        return list(self.pp_layers) or [num_layers // stages] * stages

    def rank_layers(self, num_layers: int) -> list[int]:
        """Layers of each pipeline rank, over its virtual stages."""
        layers = self.stage_layers(num_layers)
        return [sum(layers[rank :: self.pp]) for rank in range(self.pp)]

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tp * self.pp * self.cp

    def problems(self) -> Iterator[str]:
        yield from at_least("parallel", 1, tp=self.tp, pp=self.pp, vpp=self.vpp, cp=self.cp)
        if self.sp and self.tp == 1:
            yield "parallel.sp=true needs parallel.tp > 1; set tp or drop sp"
        if self.vpp > 1 and self.pp == 1:
            yield f"parallel.vpp={self.vpp} needs parallel.pp > 1; set pp or drop vpp"
        if self.pp_layers and len(self.pp_layers) != self.pp * self.vpp:
            yield (
                f"parallel.pp_layers={list(self.pp_layers)} has {len(self.pp_layers)} numbers for "
                f"pp={self.pp} x vpp={self.vpp} stages; give one a stage"
            )
        if any(count < 1 for count in self.pp_layers):
            yield (
                f"parallel.pp_layers={list(self.pp_layers)} leaves a stage without layers; give "
                "each at least 1"
            )
