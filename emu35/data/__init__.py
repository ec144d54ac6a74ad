"""Token shards: how files become them, and how training reads them.

Two halves meet at a folder of shards, one folder a source.

Writing. :mod:`~emu35.data.readers` turn what people have (webdataset tars, JSON lines, parquet,
folders, text) into raw records or named rejects; :mod:`~emu35.data.ingest` resizes and encodes the
pictures, serializes each document into one token sequence and appends it to a shard
(:mod:`~emu35.data.shards`). A record is one document; some tasks of fine-tuning make several of it,
and the clips of one video can be joined into one.
Pictures can also be encoded once and kept as codes (:mod:`~emu35.data.codes`), which are read as
pictures are, without a GPU.
A shard is a plain webdataset tar: a document is three members, ``KEY.tok`` (token ids, uint32),
``KEY.mod`` (modality, run-length coded) and ``KEY.json`` (where it came from, picture grids and
spans). Beside it lies ``.idx`` (:mod:`~emu35.data.index`), which holds every offset and length, so
that training maps the tar and slices it without parsing anything. An index names the digest of its
tar; a shard and an index that do not match are refused, or left out and named
(``data.damaged``).

Reading. Planning is global, fetching is local. From the index lengths alone every rank computes the
same stream of packed samples (:mod:`~emu35.data.plan`): the source that was served least for its
ratio is next (:mod:`~emu35.data.mix`), its documents come in a shuffled order
(:mod:`~emu35.data.order`, :mod:`~emu35.data.cursor`), and each goes into the open bin it fits best
(:mod:`~emu35.data.pack`). A rank then reads only the bytes of its own slice of a global step and
lays them out as a :class:`~emu35.data.batch.Batch`. Since no random generator, worker or rank
number takes part in planning, the stream is the same for every data-parallel size, and the state
of a run is a cursor per source plus the bins that are open: a few KB of JSON, restored without
replay. (Bins hold document numbers: where documents are of a few dozen tokens and rows of 32,768,
it becomes a few hundred KB.)

What a source gives may be narrowed. ``filter`` leaves documents out by what the index tells of
them (:mod:`~emu35.data.filter`), and says how many. ``schedule`` changes its ratio with the steps;
targets are kept across a change, so that what was due stays due. ``epochs`` and ``max_tokens`` end
it: the others share its ratio from then on, and its documents in open bins still come out. A run
whose sources all end is refused at the start if they cannot last for its steps, and stops with a
sentence if they do not. All of this is part of the plan, hence the same on every rank and held to
on resuming. What has come out of each source in samples, tokens and documents, is counted in the
state and logged as ``data/tokens/NAME``, ``data/documents/NAME`` and ``data/epoch/NAME``.

With ``data.packing=offline`` (paper: stage 2 and fine-tuning) each source is instead packed once,
over all its documents at a time, and the shuffled rows are what the mixture draws. Documents of one
row then come from all over the source, and rows are drawn by their tokens, so that ratios hold.
``emu35 data pack`` (:mod:`emu35.data.packed`) does the same once and writes the rows as shards, of
which each member is a row (:mod:`emu35.data.pieces`): a run then plans nothing at its start and
reads one stretch a row (:mod:`emu35.data.packed_items`). Nothing has to be set for such a folder
but ``data.sequence_length``, which must be that of its rows.

A document is never joined to another: labels stop at its last token, positions restart, and a row
holds whole documents. Only a document longer than the row may be cut, at a part boundary where one
is near and never inside a picture (:mod:`~emu35.data.split`); its pieces are drawn one after the
other, so that the clips of one video keep their order in time. ``data.overlong`` can also leave it
out, or refuse to start.

Where shards lie (:mod:`~emu35.data.storage`) matters to nothing above: local ones are mapped in
place, those behind a URL come into a bounded cache on this host (:mod:`~emu35.data.cache`) when
they are first read.

Answers of a model leave as stories (:mod:`~emu35.data.story`), the protobuf files that the official
viewer reads.

Looking. :mod:`~emu35.data.stats` counts, :mod:`~emu35.data.show` decodes single documents,
:mod:`~emu35.data.trace` plans a step of a run again and says which documents each of its rows was
made of, and :mod:`~emu35.data.validate` reads folders whole and names everything that is wrong.

Modality codes are stored, loss weights are not: what a token counts for is the stage's business.
"""
