"""Token shards: how files become them, and how training reads them.

Two halves meet at a folder of shards, one folder a source.

Writing. :mod:`~emu35.data.readers` turn what people have (webdataset tars, JSON lines, folders,
text) into raw records or named rejects; :mod:`~emu35.data.ingest` resizes and encodes the pictures,
serializes each document into one token sequence and appends it to a shard
(:mod:`~emu35.data.shards`). A record is one document; some tasks of fine-tuning make several of it.
A shard is a plain webdataset tar: a document is three members, ``KEY.tok`` (token ids, uint32),
``KEY.mod`` (modality, run-length coded) and ``KEY.json`` (where it came from, picture grids and
spans). Beside it lies ``.idx`` (:mod:`~emu35.data.index`), which holds every offset and length, so
that training maps the tar and slices it without parsing anything. An index names the digest of its
tar; one that does not match is refused.

Reading. Planning is global, fetching is local. From the index lengths alone every rank computes the
same endless stream of packed samples (:mod:`~emu35.data.plan`): the source with the largest token
deficit is next (:mod:`~emu35.data.mix`), its documents come in a shuffled order
(:mod:`~emu35.data.order`), and each goes into the open bin it fits best
(:mod:`~emu35.data.pack`). A rank then reads only the bytes of its own slice of a global step and
lays them out as a :class:`~emu35.data.batch.Batch`. Since no random generator, worker or rank
number takes part in planning, the stream is the same for every data-parallel size, and the state
of a run is a cursor per source plus the bins that are open: a few KB of JSON, restored without
replay.

With ``data.packing=offline`` (paper: stage 2 and fine-tuning) each source is instead packed once,
over all its documents at a time, and the shuffled rows are what the mixture draws. Documents of one
row then come from all over the source, and rows are drawn by their tokens, so that ratios hold.

A document is never joined to another: labels stop at its last token, positions restart, and a row
holds whole documents. Only a document longer than the row may be cut, at a part boundary where one
is near and never inside a picture (:mod:`~emu35.data.split`); ``data.overlong`` can also leave it
out, or refuse to start.

Answers of a model leave as stories (:mod:`~emu35.data.story`), the protobuf files that the official
viewer reads.

Looking. :mod:`~emu35.data.stats` counts, :mod:`~emu35.data.show` decodes single documents,
:mod:`~emu35.data.trace` plans a step of a run again and says which documents each of its rows was
made of, and :mod:`~emu35.data.validate` reads folders whole and names everything that is wrong.

Modality codes are stored, loss weights are not: what a token counts for is the stage's business.
"""
