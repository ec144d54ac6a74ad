"""The HTTP server over the generation engine: ``emu35 serve``.

Three kinds of threads share the work. The *event loop* speaks HTTP (:mod:`.app`, with the bodies
in :mod:`.protocol` and the answers in :mod:`.completions` and :mod:`.chat`) and never computes.
The *engine thread* (:mod:`.engine_thread`) owns the engine and does nothing but step it; requests
reach it through a mailbox, tokens come back through asyncio queues. *Workers* read prompts and
turn pictures into codes and codes into pictures (:mod:`.pictures`), so that neither a large
reference nor a preview delays anybody's next token.

Every refusal is a :class:`.refusal.Refusal`, which has the shape of OpenAI's errors and says value,
rule and remedy. What arrives is bounded before it is looked at: the body by bytes, references by
number, pictures by pixels, the waiting line by requests. A client that goes away takes its requests
out of the engine.

A trainer may replace the weights (``--weight-updates``, :mod:`.weights`) and ask for its rollouts
in full (``vllm_xargs``, :mod:`.exact`); every answer names the weights it is by.

:mod:`.server` ties it together: it is up while the model still loads (``/health`` says so), and at
SIGTERM it refuses new work, lets what runs finish within the grace time and leaves with code 0.
The folder ``page`` holds the page at ``/``: no framework, nothing fetched from elsewhere.
"""
