"""Training the image tokenizer (paper sections 2.3 and 5.2).

A step is one global batch, and :meth:`emu35.stages.ibq.task.IBQTask.train_step` reads like it::

    pictures.py     which pictures there are, filtered, in which shapes
    codebook.py     once: the codebook starts from what the encoder already says
    objective.py    every term of the loss that has a weight, and what is logged of it
    engine.py       gradients of the global batch, their norm, the update: plain torch
    zero.py         the same by DeepSpeed ZeRO-1, for several ranks
    validation.py   held-out pictures through the averaged weights
    state.py        what a checkpoint holds
    files.py        what people look at
    stage.py        assembles all of this

**Two optimizers.** The generator is the tokenizer with the projector of the distillation, the
discriminator its opponent. One pass through the tokenizer serves both: the discriminator judges the
very reconstructions that the generator's gradient came from, and both are updated at the end of the
step. A step that the guard refuses, for either of them, changes nothing: neither weights nor
moments, not the average, LeCAM's anchors or running statistics.

**Ranks** are data-parallel replicas, each with its part of the global batch. Plain engines average
gradients and update whole copies; with ``parallel.zero1`` and more than one rank DeepSpeed reduces
gradients to the rank that owns them, which holds moments and updates weights of its share alone.
Both write the same checkpoint, moments by the name of their weight, so a run may go on in another
number of ranks. Terms over the whole batch (entropy of the codebook, batch norm of the
discriminator) span the micro-batches that ranks take at the same time; all others do not depend on
how the batch is cut.
"""
