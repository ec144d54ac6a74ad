"""Inference: requests in, documents out, many at a time.

A :class:`~emu35.inference.request.Request` is a prompt with its unconditional twin, a seed and the
numbers of its sampling. :mod:`~emu35.inference.engine` holds the key-value cache and works in
steps: schedule (which tokens does each row of the batch feed), run (one forward), postprocess
(what may come next, which of it comes, is the request finished). Three parts answer these:

- :mod:`~emu35.inference.grammar` is a finite-state machine over one sequence. It says what is
  legal next: a forced token (grid size, end of row, end of image), one of a few size digits, any
  text token, or any visual token. A picture is therefore never ragged, whatever the weights are.
- :mod:`~emu35.inference.sampler` turns logits into tokens: classifier-free guidance, mask,
  temperature, top-k, top-p, then one draw from the request's own random generator.
- :mod:`~emu35.inference.scheduler` gives requests rows of the cache. A guided request has two, the
  conditional stream and the unconditional one, which sees its own prompt and images but never the
  generated text. Finished requests leave and waiting ones take their rows.

Forced tokens cost no forward of their own: they are fed together with the token before them. Each
request draws from its own generator, and noise belongs to token ids rather than ranks, so a
request gives the same tokens whatever shares its batch (up to floating-point ties, because matrix
products of different batch sizes differ in their last bits).
"""
