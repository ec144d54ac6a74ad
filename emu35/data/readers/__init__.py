"""Input formats. Each reader yields raw records in file order, and a named reject for each bad one.

What a line of JSON or a row of parquet may be is told in :mod:`~emu35.data.readers.rows`; published
conversations and edits (:mod:`~emu35.data.readers.dialogues`) are read as they are. Clips of one
video can be gathered into one document (:mod:`~emu35.data.readers.clips`).

Records of fine-tuning tasks are JSON lines, too: :mod:`~emu35.data.readers.task_table` says what is
in them, :mod:`~emu35.data.readers.task_records` checks it, and
:mod:`~emu35.data.readers.task_documents` makes dialogues of them.

A reader never decodes a picture and never raises for a bad record: what it cannot use becomes a
:class:`~emu35.data.readers.records.Reject`. Members of tars are read as bytes under their name and
never extracted, so a path such as ``../../x`` in one is only a name.
:func:`emu35.data.readers.discover.find_inputs` decides which reader an input belongs to; benchmarks
(:mod:`emu35.data.readers.benchmarks`) are read where they are asked for by name.
"""
