"""Training: one loop for every stage, and the language-model step it calls.

``trainer.fit`` is the loop: train, log, validate, save, stop, in sight and in that order. What a
step is belongs to a task: ``step.LMTask`` runs the micro-batches of one global batch through
megatron-core's schedule with the objective of ``objective``, then ``optim`` updates. The image
tokenizer's task lives with its stage.
"""
