"""Bytes that the fullest rank holds during a training step of the language model.

Each term is a formula of its own, so that a reader can check it:

- weights, main gradients, optimizer state: 2 or 4 bytes a weight; 4 bytes a main gradient
  (megatron-core keeps fp32 gradient buffers in both precisions); 8 bytes for AdamW's two moments
  and, with bf16 weights, 4 more for the fp32 copy of the weights. ZeRO stage 1 (arXiv 1910.02054,
  section 5.1) divides the optimizer state by the data-parallel ranks, in megatron-core dp x cp.
  With adapters the weights are frozen: only the adapters have gradients and optimizer state.
- activations: the tensors that backward needs, counted per token and layer as in arXiv 2205.05198,
  section 4, but for this architecture: grouped queries, q/k norms, rotary, SwiGLU, and attention
  that keeps no S x S matrix (the ``dense`` backend does keep it). Tensor parallelism divides
  what lies between its two collectives; sequence parallelism divides the rest as well. Stage i of a
  pipeline holds up to pp - i micro-batches, interleaved (1 + (pp - 1) / (pp vpp)) as many layers
  (same paper, appendix). A layer that is recomputed keeps its input alone, and one layer at a time
  is whole again in backward; selective recomputation keeps what its modules take in. An adapter
  keeps the rows between its two matrices.
- logits: one chunk of the loss, ``loss_chunk`` rows of logits that become their own gradient in
  place (fp32, and with bf16 weights a bf16 copy for the matrix products); the output layer's
  gradient, unless it is frozen, which the loss sums in fp32 over its chunks and hands on in the
  weights' type; and the
  hidden states of the tokens with a loss, with their gradient (``scripts/bench/loss.py`` measures
  it).

Not counted: kernels' workspaces, communication buffers, the allocator's fragmentation, and what
unfused norms keep besides (on a CPU, where nothing is fused, a quarter more than said here).
"""

from dataclasses import dataclass

from emu35.config.engine import EngineConfig, Recompute, RecomputeModule
from emu35.config.model import AttentionBackend, LMConfig
from emu35.config.parallel import ParallelConfig
from emu35.config.stage import LMStageConfig, LoRAConfig, Precision, adapters_of
from emu35.model.shapes import adapted_shapes
from emu35.planner.parameters import (
    COLUMN_TARGETS,
    RankParameters,
    layer_adapter_parameters,
)

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MAIN_COPY_BYTES = 4


@dataclass(kw_only=True, slots=True, frozen=True)
class Memory:
    """Bytes on the fullest rank; ``activations`` is None where no formula covers the model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    logits: int

    @property
    def total(self) -> int:
        return sum(
            (self.weights, self.gradients, self.optimizer, self.activations or 0, self.logits)
        )


def weight_bytes(precision: Precision) -> int:
    """Bytes of one parameter, and of one element of an activation."""
    return 2 if precision is Precision.bf16 else 4


def optimizer_bytes(parameters: int, *, precision: Precision, shards: int) -> int:
    """AdamW's state for ``parameters`` weights over ``shards`` ranks (1 without ZeRO-1)."""
    each = MOMENT_BYTES + (MAIN_COPY_BYTES if precision is Precision.bf16 else 0)
    return -(-parameters * each // shards)


def language_model_memory(
    model: LMConfig,
    *,
    stage: LMStageConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    held: RankParameters,
    vocabulary_size: int,
    sequence_length: int,
    data_parallel: int,
    micro_batches: int,
) -> Memory:
    """Memory of the fullest rank, which holds the parameters ``held``."""
    element = weight_bytes(stage.precision)
    shards = data_parallel * parallel.cp if parallel.zero1 else 1
    tokens = stage.micro_batch_size * sequence_length // parallel.cp
    lora = adapters_of(stage)
    activations = _activations(
        model,
        parallel=parallel,
        engine=engine,
        tokens=tokens,
        keys=sequence_length,
        element=element,
        micro_batches=micro_batches,
        lora=lora,
    )
    total = trained = held.total
    if lora is not None:
        trained = held.layers * layer_adapter_parameters(model, lora=lora, parallel=parallel)
        total += trained
    return Memory(
        weights=total * element,
        gradients=trained * GRADIENT_BYTES,
        optimizer=optimizer_bytes(trained, precision=stage.precision, shards=shards),
        activations=activations,
        logits=loss_bytes(
            tokens=tokens,
            chunk=stage.loss_chunk,
            hidden_size=model.hidden_size,
            vocabulary_size=vocabulary_size,
            parallel=parallel,
            precision=stage.precision,
            frozen=lora is not None,
        ),
    )


def loss_bytes(
    *,
    tokens: int,
    chunk: int,
    hidden_size: int,
    vocabulary_size: int,
    parallel: ParallelConfig,
    precision: Precision,
    frozen: bool = False,
) -> int:
    """What the chunked loss of ``tokens`` tokens needs besides weights and incoming hidden states,
    forward and backward, when every token has a loss. ``frozen``: the output layer is not trained.
    """
    element = weight_bytes(precision)
    rows = -(-vocabulary_size // parallel.tp)
    # In bf16, a second copy in the weights' type: of the chunk for its matrix products, of the
    # gradient for each chunk's share of it and at the end.
    each = 4 if element == 4 else 4 + element
    hidden = (2 + (parallel.sp and parallel.tp > 1)) * element  # sp gathers the ranks' slices
    gradient = 0 if frozen else each * rows * hidden_size
    return each * min(chunk, tokens) * rows + gradient + hidden * tokens * hidden_size


def _activations(
    model: LMConfig,
    *,
    parallel: ParallelConfig,
    engine: EngineConfig,
    tokens: int,
    keys: int,
    element: int,
    micro_batches: int,
    lora: LoRAConfig | None,
) -> int:
    """The fullest pipeline rank, which with uneven stages need not be the first."""
    whole = layer_activation_bytes(
        model, parallel=parallel, engine=engine, tokens=tokens, keys=keys, element=element
    )
    whole += _adapter_activation_bytes(
        model, lora=lora, parallel=parallel, tokens=tokens, element=element
    )
    if engine.recompute is not Recompute.full:
        in_flight = _in_flight(parallel, micro_batches=micro_batches)
        stages = parallel.rank_layers(model.num_layers)
        return round(whole * max(n * f for n, f in zip(stages, in_flight, strict=True)))
    split = parallel.tp if parallel.sp else 1
    kept = tokens * model.hidden_size * element // split
    found: list[float] = []
    for rank, in_flight in enumerate(_in_flight(parallel, micro_batches=micro_batches)):
        layers = parallel.stage_layers(model.num_layers)[rank :: parallel.pp]
        recomputed = sum(min(n, engine.recompute_layers or n) for n in layers)
        stored = recomputed * kept + (sum(layers) - recomputed) * whole
        found.append(stored * in_flight + whole)
    return round(max(found))


def layer_activation_bytes(
    model: LMConfig,
    *,
    parallel: ParallelConfig,
    engine: EngineConfig,
    tokens: int,
    keys: int,
    element: int,
) -> int:
    """What one layer keeps for backward, for ``tokens`` tokens of this rank, unless it is
    recomputed as a whole.

    Hidden-wide: input and output of both norms, and one mask byte a dropout. Attention-wide: the
    joint projection, q and k after their norms, q and k after rotation, and the output. FFN-wide:
    gate, up, silu(gate) and their product.
    """
    heads, groups = model.num_attention_heads, model.num_kv_heads
    query, key = heads * model.head_dim, groups * model.head_dim
    selective = engine.recompute is Recompute.selective
    again = set(engine.recompute_modules) if selective else set[RecomputeModule]()
    dropout_bytes = 2 * model.hidden_size if model.hidden_dropout > 0 else 0
    norms = 2 if RecomputeModule.layernorm in again else 4
    hidden = norms * model.hidden_size * element + dropout_bytes
    attention = ((query + 2 * key) + (query + key) + query) * element
    statistics = 0
    if RecomputeModule.core_attn not in again:
        attention += (query + key) * element
        statistics = 4 * heads  # fp32 log-sum-exp of every row and head
        if model.attention_backend is AttentionBackend.dense:
            statistics += heads * keys * element
    mlp = 0 if RecomputeModule.mlp in again else 4 * model.ffn_hidden_size * element
    split = parallel.tp if parallel.sp else 1
    return tokens * (hidden // split + (attention + mlp + statistics) // parallel.tp)


def _adapter_activation_bytes(
    model: LMConfig,
    *,
    lora: LoRAConfig | None,
    parallel: ParallelConfig,
    tokens: int,
    element: int,
) -> int:
    """What the adapters of one layer keep besides: A x, of all tokens beside a column-parallel map,
    of this rank's slice of them beside a row-parallel one; and a byte an input for dropout."""
    if lora is None:
        return 0
    split = parallel.tp if parallel.sp else 1
    total = 0
    for target, (_, inputs) in adapted_shapes(model, lora=lora).items():
        column = target in COLUMN_TARGETS
        total += (tokens if column else tokens // split) * lora.rank * element
        if lora.dropout > 0:
            total += tokens * inputs // (split if column else parallel.tp)
    return total


def _in_flight(parallel: ParallelConfig, *, micro_batches: int) -> list[float]:
    """How many micro-batches' worth of its layers each pipeline rank holds at its fullest."""
    pp = parallel.pp
    if pp == 1:
        return [1.0]
    if parallel.vpp > 1:
        # One micro-batch is at most all of a rank's layers, so short runs cap the schedule.
        return [min(micro_batches, pp * (1 + (pp - 1) / (pp * parallel.vpp)))] * pp
    return [min(micro_batches, pp - rank) for rank in range(pp)]
