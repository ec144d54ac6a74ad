"""Training: one loop for every stage, and the language-model step it calls.

``trainer.fit`` is the loop: train, log, validate, save, stop, in sight and in that order. What a
step is belongs to a task: ``step.LMTask`` runs the micro-batches of one global batch through
megatron-core's schedule with the objective of ``objective``, then ``optim`` updates, unless
``guard`` refuses the step (a loss or gradient that is not finite, or a spike). ``feed`` reads its
data once for all tensor-parallel ranks of a replica. The image
tokenizer's task lives with its stage.

Three modules watch. ``clock`` notes what a rank does and since when; ``measure`` makes metrics of
that (seconds by phase, FLOPs, the slowest rank); ``watchdog`` ends a run in which nothing moves any
more and names the rank. ``rng`` and ``signals`` are what exact resuming and leaving need.
"""
