"""Core attention: one interval mask, several backends.

A backend is one function ``attend(queries, keys, values, context, dropout) -> output`` over
[B, heads, S, D] tensors. ``dense`` builds the boolean matrix and is the oracle; ``segment`` cuts
the sequence into causal and full blocks and never builds it. ``core.py`` is what mcore's layers
call: rotary, cache and the choice of backend.
"""
