"""From a command line to running ranks.

``compose`` turns overrides into one validated :class:`~emu35.config.RunConfig`; ``rundir`` gives
the run its folder, writes the configuration there once and keeps two processes out of the same
folder; ``launch`` starts the ranks, here or on other nodes, and answers for them; ``worker`` is
what every rank executes: it reads the plain ``config.yaml`` back and calls the stage. Ranks never
compose on their own, so what was validated is what runs.

Nothing here imports torch except ``worker`` once a stage begins; ``show`` and ``plan`` therefore
answer at once.
"""
