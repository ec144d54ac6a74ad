"""Inference: requests in, interleaved text and images out, many at a time.

A :class:`~emu35.inference.request.Request` is a prompt with its unconditional twin, a seed and the
numbers of its sampling. :mod:`~emu35.inference.engine` works in steps: schedule (what does each
stream feed), run (one forward over all of it, without padding), choose (what comes next, for every
sequence that is ready). The parts it is made of:

- :mod:`~emu35.inference.grammar`, a finite-state machine over one sequence, says what is legal
  next: a forced token (grid size, end of row, end of image), one of a few size digits, text, or any
  visual token. A picture is therefore never ragged, and never cut short by a limit.
- :mod:`~emu35.inference.choose` projects hidden states on the legal rows of the vocabulary and
  nothing else; :mod:`~emu35.inference.sampler` draws, and says how likely the choice was, which is
  what reinforcement learning needs of a rollout.
- :mod:`~emu35.inference.scheduler` decides who is in flight. A guided request has two streams, the
  conditional one and the unconditional one, which sees its own prompt and images but never the
  generated text; they come and go as a pair. :mod:`~emu35.inference.arena` gives streams their
  slots of the cache, contiguous and growing; when they run out, the youngest request steps back and
  goes on later as if nothing had happened.
- :mod:`~emu35.inference.ask` makes requests of what people wish, and
  :mod:`~emu35.inference.progress` makes what people can follow of a request's tokens.
- :mod:`~emu35.inference.ranks` keeps tensor-parallel ranks of one mind, and
  :mod:`~emu35.inference.lead` lets rank 0 take the requests for all of them.

Forced tokens cost no forward, projection or draw of their own: they are fed together with the token
before them. Random numbers are a function of (seed, position, id), so a request gives the same
tokens whatever shares its batch, wherever it was interrupted, and on every device (up to
floating-point ties, because matrix products of different batch sizes differ in their last bits).

A request may ask for its pictures to be decoded in parallel (discrete diffusion adaptation,
:mod:`emu35.dida`). Where the grammar enters the first row of one, its
:class:`~emu35.inference.canvas.Canvas` takes the slots behind the prefix as a span that is not
causal (:class:`~emu35.model.cache.Span`), as often as there are steps, each time overwriting what
the step before wrote. :mod:`~emu35.inference.denoise` makes the next canvas of the hidden states,
and at last tokens, which the grammar takes like any others; they are fed once more, causally, with
the text that follows, or not at all where the answer ends with the picture. Requests at different
steps, with different samplers, and token by token share every forward.
"""
