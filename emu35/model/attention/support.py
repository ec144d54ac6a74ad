"""What each attention backend can do, said once; a build that asks for more is refused by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from types import MappingProxyType

import torch

from emu35.config import AttentionBackend, LMConfig, ParallelConfig, Precision
from emu35.config.parallel import CPCommType
from emu35.errors import ConfigError


class MaskKind(StrEnum):
    """The masks that a stage trains with: plain causal within packed documents, or any intervals
    (bidirectional spans, noisy copies)."""

    packed_causal = "packed_causal"
    intervals = "intervals"


@dataclass(kw_only=True, slots=True, frozen=True)
class Support:
    """What a backend trains with.

    Attributes:
        cpu, cuda: devices on which its backward exists.
        masks: kinds of mask.
        fp32: whether it takes fp32, not only bf16.
        dropout: whether it can drop attention weights.
        module: what must be importable.
    """

    cpu: bool
    cuda: bool = True
    masks: frozenset[MaskKind] = frozenset(MaskKind)
    fp32: bool = True
    dropout: bool = True
    module: str = "torch"


_CAUSAL_ONLY = frozenset({MaskKind.packed_causal})

SUPPORT: Mapping[AttentionBackend, Support] = MappingProxyType(
    {
        AttentionBackend.segment: Support(cpu=True),
        AttentionBackend.dense: Support(cpu=True),
        AttentionBackend.flex: Support(cpu=False, dropout=False),
        AttentionBackend.flash: Support(cpu=False, masks=_CAUSAL_ONLY, fp32=False, dropout=False),
        AttentionBackend.te: Support(
            cpu=False, masks=_CAUSAL_ONLY, fp32=False, module="transformer_engine"
        ),
    }
)


def require_support(
    config: LMConfig, *, parallel: ParallelConfig, precision: Precision, masks: MaskKind
) -> None:
    """Check that ``config.attention_backend`` can train this model on this rank's device.

    Raises:
        ConfigError: it cannot; the message says why and names the backends that can.
    """
    wanted = config.attention_backend

    def lacks(backend: AttentionBackend) -> list[str]:
        return list(
            _lacking(
                SUPPORT[backend], config=config, parallel=parallel, precision=precision, masks=masks
            )
        )

    if reasons := lacks(wanted):
        able = ", ".join(backend for backend in AttentionBackend if not lacks(backend))
        raise ConfigError(
            f"model.attention_backend={wanted} {' and '.join(reasons)}; use one of {able}"
        )


def _lacking(
    support: Support,
    *,
    config: LMConfig,
    parallel: ParallelConfig,
    precision: Precision,
    masks: MaskKind,
) -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not getattr(support, device):
        yield f"has no backward on {device}"
    if masks not in support.masks:
        yield f"does not know masks of the kind {masks}"
    elif (
        MaskKind.intervals not in support.masks
        and parallel.cp > 1
        and parallel.cp_comm_type is CPCommType.all_gather
    ):
        # A rank's rows are pieces of documents, which plain causal attention cannot say.
        yield "does not go with parallel.cp_comm_type=all_gather (a2a would do)"
    if precision is Precision.fp32 and not support.fp32:
        yield "computes in bf16 only, not in stage.precision=fp32"
    if config.attention_dropout > 0 and not support.dropout:
        yield f"cannot apply model.attention_dropout={config.attention_dropout}"
    if find_spec(support.module) is None:
        yield f"needs {support.module}, which is not installed (extra 'gpu')"
