"""How many floating-point operations a training step takes.

The convention, so that a utilisation can be compared with others': *model* FLOPs. A multiply-add
counts as 2, the backward pass as twice the forward, hence 6 for each weight of a matrix and token;
4 where the weight is frozen, for backward passes through it but forms no gradient of it.
Attention counts the (query, key) pairs that the mask lets see each other and no others: half a
square for one long document, less for packed ones. Tokens are document tokens; padding, work that
recomputation repeats, norms, rotary embedding, activation functions, softmax and the embedding
lookup count nothing.
"""

from emu35.config import LMConfig


def matrix_weights(config: LMConfig, *, vocabulary_size: int) -> int:
    """Weights that every token is multiplied with: all but the input embedding and the norms. The
    rows that pad the vocabulary to a multiple are not counted."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_kv_heads * config.head_dim
    attention = hidden * (heads + 2 * groups) + heads * hidden
    mlp = 3 * hidden * config.ffn_hidden_size
    return config.num_layers * (attention + mlp) + hidden * vocabulary_size


def step_flops(
    config: LMConfig,
    *,
    vocabulary_size: int,
    tokens: float,
    visible_pairs: float,
    adapters: int | None = None,
) -> float:
    """Model FLOPs of forward and backward over one global batch.

    Args:
        config: the architecture.
        vocabulary_size: without padding rows.
        tokens: document tokens.
        visible_pairs: (query, key) pairs that the mask allows, per head and layer; a causal
            document of n tokens has n (n + 1) / 2.
        adapters: parameters of all adapters where nothing else is trained.
    """
    weights = matrix_weights(config, vocabulary_size=vocabulary_size)
    # Scores and weighted values: a product of head_dim each, for every head.
    pair = 2 * 2 * config.num_attention_heads * config.head_dim * config.num_layers
    products = 6.0 * weights if adapters is None else 4.0 * weights + 6.0 * adapters
    return products * tokens + 3.0 * pair * visible_pairs
