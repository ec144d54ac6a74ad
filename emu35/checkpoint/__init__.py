"""Checkpoints and releases: what is on disk, how it gets there whole, and how it is read back.

Two forms of the same model live on disk.

A *checkpoint* is a folder ``checkpoints/step_00000100`` inside a run. The trainer's writers put any
files they like there (:mod:`emu35.checkpoint.sharded` puts the sharded model and optimizer);
:class:`~emu35.checkpoint.manager.CheckpointManager` gives them a temporary folder, then hashes
every file, writes ``manifest.json``, syncs everything to the disk and renames the folder into
place. A rename is the only moment at which a checkpoint starts to exist, so a killed save leaves
nothing but a temporary folder that the next start removes. Reading trusts nothing: the newest
folder whose manifest and files all verify is the one that is used, and each one passed over is
named together with the reason.

What is in the sharded files does not depend on the layout that wrote them: every tensor has its
name and place in the whole model, the optimizer's too, with ZeRO-1 or without
(:mod:`~emu35.checkpoint.optimizer_state`), so a run resumes on other ranks as it is, and
:mod:`~emu35.checkpoint.reshard` copies a checkpoint without any. A save is planned together,
written by each rank alone and listed together (:mod:`~emu35.checkpoint.saving`,
:mod:`~emu35.checkpoint.staged`); the middle part may happen while training goes on. A run with
adapters keeps the frozen weights beside them, so it stands alone; only its own training sees the
two apart, everyone else who opens it gets their sum.

A *release* is the folder of the official code: ``config.json`` and safetensors under the official
tensor names. :mod:`~emu35.checkpoint.hf` maps names and layouts both ways (pure functions on
tensors), :mod:`~emu35.checkpoint.hf_config` maps the architecture, and
:mod:`~emu35.checkpoint.safetensor_files` writes and reads the shards. Adapters of noisy copies lie
in a folder of their own there (:mod:`~emu35.checkpoint.dida_adapter`).
:mod:`~emu35.checkpoint.source` opens either form for generation and evaluation.

A *start* (``stage.init_from``) may be either form, or a Qwen3 folder as published.
:mod:`~emu35.checkpoint.published` compares what it says of itself with the run, without torch, so
that the launching host can; :mod:`~emu35.checkpoint.start` compares the tensors too, and
:func:`~emu35.checkpoint.source.load_into` fills the chunks of every rank, which reads its own parts
of the safetensors alone. :mod:`~emu35.checkpoint.qwen3` draws the vocabulary rows that Qwen3 lacks.

Nothing here unpickles: checkpoints are loaded by weights-only readers, releases are safetensors,
and every path read from a manifest or an index is checked to stay inside its folder.
"""
