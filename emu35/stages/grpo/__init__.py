"""Reinforcement learning: group relative policy optimization over text and image tokens (paper
section 4.2; GRPO, arXiv 2402.03300).

A step is one round, and :meth:`emu35.stages.grpo.task.GRPOTask.train_step` reads like it::

    sample    prompts.py plan.py requests.py source.py   which prompts, asked how
              engine.py embedded.py whole_model.py       who answers, with which weights
              replica.py sampling.py                     which rank answers what
    score     scoring.py sampler.py                      rewards at work while others are sampled
    compare   advantage.py lesson.py                     better than the other answers by how much
    step      replay.py rows.py updates.py objective.py  what was drawn is replayed, made likelier
    keep      books.py archive.py pages.py diversity.py rewards_report.py stopping.py

types.py has the nouns. The rewards themselves are in :mod:`emu35.rewards`.

**The behaviour policy is part of the rollout.** Image tokens are drawn from the visual part of the
vocabulary, perhaps from the best few thousand of it, perhaps with guidance, and the tokens of a
picture's frame are not drawn at all. So every sampled token carries its log-probability and its
support, every forced one a flag, and the trainer replays the very same choice: the grammar is
walked again for the legal sets, what top-k and top-p left travels with the rollout, guidance puts
the unconditional stream into the row as a document of its own (twice the cost), temperatures divide
the same logits (:mod:`emu35.model.policy`). Forced tokens are in no loss, no KL and no entropy.
Before the first update of a step the trainer's log-probabilities are compared with the engine's:
``drift/mean`` and ``drift/largest`` in the log, thresholds in ``stage.drift``, and weights that
correct for it where they are asked for. In fp32 the two agree to about 1e-5.

**KL** is measured on unfiltered log-probabilities, of all ids and without guidance, at the sampled
tokens: k3 to a frozen copy of the initial weights (exchanged with the trained ones for a pass), or
to the base of adapters that are turned off.

**Layouts.** The same seeds give the same answers, and these the same updates, in every layout that
the trainer knows (``tests/stages/grpo/test_policy_layouts.py``). Denominators are sums over the
whole update and known before it, so neither micro-batches nor ranks change the loss. Each
data-parallel replica answers its share of the prompts and trains on whole groups; its other ranks
sample a part each. A trainer without pipeline stages shares its memory with the engine; with them
every rank gets a copy of all layers before each round, over the pipeline group in pieces of
``stage.rollout.bucket_bytes``.

**Resuming.** A checkpoint lies between rounds. It holds the place among the prompts, the rewards'
statistics and early stopping beside weights and optimizer; a seed is a function of the run's seed,
the task, the prompt, the number of the draw and of the answer. So a run that is killed and started
again draws and scores the same. The reference is read from ``stage.init_from`` every time, at the
step that the run started from, whatever that one has learned since.

**Stopping.** A step may take longer than the notice that a scheduler gives. So whoever samples
looks for a stop request every few forwards, in training and validation, and leaves its answers;
when all ranks have left theirs or are done, they agree, and the step is given up, the prompts with
it: the checkpoint is that of the step before, and the resumed run draws the same again. A request
that reaches a single rank waits for what the others sample. Behind sampling a step is finished: let
``launch.slurm.save_seconds`` cover the rest of the scoring, the updates and the checkpoint.

**Departures from the design pages.** Rollouts are compared before any update in every step, at the
cost of a forward pass, rather than taking the engine's numbers for the denominator of ratios. An
answer with fewer pictures than were asked for is not unscored: it has the worst score, or a model
could leave out what it draws badly.
"""
