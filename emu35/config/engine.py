"""How megatron-core computes a layout: which layers, what is recomputed, what is overlapped.

None of it changes what is learned, FP8 apart; defaults run anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from emu35.config.check import at_least


class LayerSpec(StrEnum):
    """Where layers come from: ``local`` (megatron-core's own linears, our norm and SwiGLU; any
    device) or ``te`` (transformer-engine's fused ones; CUDA, extra ``gpu``). Checkpoints of one
    load into the other."""

    local = "local"
    te = "te"


class Recompute(StrEnum):
    """Activation recomputation (arXiv 2205.05198): nothing, parts of a layer, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class RecomputeModule(StrEnum):
    """What ``selective`` computes again: the core attention (rotary and exchange with it), the
    norms in front of attention and MLP, or the MLP."""

    core_attn = "core_attn"
    layernorm = "layernorm"
    mlp = "mlp"


class FP8(StrEnum):
    """FP8 of transformer-engine's linears: ``hybrid`` is E4M3 forward and E5M2 backward."""

    off = "off"
    e4m3 = "e4m3"
    hybrid = "hybrid"


class FP8Recipe(StrEnum):
    """Scaling of transformer-engine. ``delayed`` keeps a history of maxima, which starts anew when
    a run resumes; the others keep no state. ``mxfp8`` needs Blackwell."""

    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"
    delayed = "delayed"


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """Options of megatron-core beside the layout itself.

    Attributes:
        layers: layer implementation.
        recompute: activations that backward computes again instead of keeping.
        recompute_modules: parts of a layer, for ``recompute=selective``.
        recompute_layers: layers a pipeline stage (or virtual stage) recomputes, for
            ``recompute=full``; 0: all of them.
        overlap_grad_reduce: reduce gradients of a bucket while backward goes on.
        overlap_param_gather: gather ZeRO-1's parameters while forward goes on.
        overlap_p2p: send and receive between virtual pipeline stages while computing.
        fp8: number format of the linears.
        fp8_recipe: how FP8 is scaled.
        fp8_amax_history: steps that ``delayed`` looks back.
        bf16_edge_layers: first and last layers that stay in bf16 under FP8, on each side.
    """

    layers: LayerSpec = LayerSpec.local
    recompute: Recompute = Recompute.none
    recompute_modules: list[RecomputeModule] = field(
        default_factory=lambda: [RecomputeModule.core_attn]
    )
    recompute_layers: int = 0
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p: bool = False
    fp8: FP8 = FP8.off
    fp8_recipe: FP8Recipe = FP8Recipe.tensorwise
    fp8_amax_history: int = 1024
    bf16_edge_layers: int = 0

    def problems(self) -> Iterator[str]:
        yield from at_least(
            "engine",
            0,
            recompute_layers=self.recompute_layers,
            bf16_edge_layers=self.bf16_edge_layers,
        )
        yield from at_least("engine", 1, fp8_amax_history=self.fp8_amax_history)
        if self.recompute is Recompute.selective and not self.recompute_modules:
            known = ", ".join(RecomputeModule)
            yield (
                "engine.recompute=selective with an empty engine.recompute_modules recomputes "
                f"nothing; name some of {known}, or use recompute=none"
            )
        if self.recompute_layers and self.recompute is not Recompute.full:
            yield (
                f"engine.recompute_layers={self.recompute_layers} counts whole layers and needs "
                f"engine.recompute=full, not {self.recompute}"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield (
                "engine.overlap_param_gather=true works on the buckets of "
                "engine.overlap_grad_reduce=true; set that too"
            )
        if self.layers is LayerSpec.local and self.fp8 is not FP8.off:
            yield f"engine.fp8={self.fp8} needs transformer-engine; set engine.layers=te"
        if self.bf16_edge_layers and self.fp8 is FP8.off:
            yield "engine.bf16_edge_layers needs engine.fp8; set it or drop this"
        if self.bf16_edge_layers and self.fp8_recipe is FP8Recipe.delayed:
            yield (
                "engine.bf16_edge_layers does not go with engine.fp8_recipe=delayed; use another "
                "recipe"
            )
        if (
            self.layers is LayerSpec.te
            and self.recompute is Recompute.selective
            and RecomputeModule.layernorm in self.recompute_modules
        ):
            yield (
                "engine.recompute_modules: layernorm cannot be recomputed with engine.layers=te, "
                "which fuses each norm with the projection behind it; use core_attn or mlp"
            )
