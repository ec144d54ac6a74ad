"""The language model on megatron-core, and everything between token ids and a loss.

Read in this order: ``mask`` (what a token may see, as data), ``context_parallel`` (one sequence on
several ranks), ``context`` (what travels through the layers), ``attention`` (the backends),
``norm``, ``rotary`` and ``swiglu`` (with gradients written out), ``lora`` (adapters beside frozen
weights), ``mcore_config``, ``spec`` and ``transformer`` (mcore's GPTModel, ours where mcore is
wrong for packed multimodal streams), ``logits`` (the chunked vocabulary-parallel loss), ``init``
(weights alike in every layout), ``build``. ``shapes`` counts parameters and ``flops`` operations,
without torch.

Training and inference share this one model: with a ``CachedForward`` in the context the same
layers decode token by token.
"""
