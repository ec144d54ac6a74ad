"""How the model is laid out over ranks; data parallelism takes what is left."""

from collections.abc import Iterator
from dataclasses import dataclass
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
    dp = world size / (tp * pp * cp)."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    cp_comm_type: CPCommType = CPCommType.all_gather
    zero1: bool = False

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
