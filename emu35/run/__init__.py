"""From a command line to running ranks.

``compose`` turns overrides into one validated :class:`~emu35.config.RunConfig`; ``rundir`` gives
the run its folder, writes the configuration there once and keeps two processes out of the same
folder; ``start`` chooses the launcher; ``worker`` is what every rank executes: it reads the plain
``config.yaml`` back and calls the stage. Ranks never compose on their own, so what was validated is
what runs.

Three launchers start ranks and answer for them:

* ``local_ranks``: processes of this host, no torchrun;
* ``torchrun``: one node of several, torchrun as a supervised child. ``torchrun_rank`` wraps the
  worker there, and ``outcomes`` carries the exit codes that torchrun would swallow;
* ``slurm``: a job script that starts one such node on every host with srun, and puts the
  job back into the queue.

All keep one promise: a stop signal makes every rank save at the end of its step, and the exit code
is then 75. ``follow`` is how a user looks at a run that was started (``status``) and ends it
(``cancel``). ``memory`` lets every process keep what it frees for its next step.

Nothing here imports torch except ``worker`` once a stage begins; ``show`` and ``plan`` therefore
answer at once.
"""
