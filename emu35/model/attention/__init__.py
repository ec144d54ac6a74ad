"""Core attention: one interval mask, several backends.

A backend is one function ``attend(queries, keys, values, context, dropout) -> output`` over
[B, heads, S, D] tensors. ``dense`` builds the boolean matrix and is the oracle; ``segment`` cuts
the sequence into causal and full blocks and never builds it; ``flex`` hands the intervals to
torch's compiled flex attention, its block mask counted directly from them; ``varlen`` gives plain
causal documents to flash kernels. ``support`` says what each can do and refuses the rest by name.
``core.py`` is what mcore's layers call: rotary, exchange, cache and the choice of backend.
"""
