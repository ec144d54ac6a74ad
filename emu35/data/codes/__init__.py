"""Pictures as codes and nothing else (``emu35 data tokenize``): encoded once, used by any text
pipeline.

What is written are tars in webdataset layout that other software reads, too::

    OUT/NAME-000000.tar
        __emu35__/codes.json      whose codes these are (:class:`~.shards.CodesMeta`)
        000000-000000.codes.npy   uint32 [rows, columns]
        000000-000000.json        the record's own fields, "caption" and "tokenized" among them
        ...
        __emu35__/digest          sha256 (hex) of every byte before this member
    OUT/usage.json, usage.npy     how often each code occurs
    OUT/rejects.jsonl             what was left out, and why

``tokenized`` of a record has the ``id`` that it had in its input, width and height of the source,
rows and columns of its codes, and again whose codes they are, since records travel without their
tar. ``emu35 data ingest`` takes such tars where it takes tars of pictures, and needs no GPU then.

It is an ingestion as any other (:mod:`emu35.data.ingest`): it can be stopped anywhere, goes on with
the same command, and gives the same bytes for any number of workers. The one exception are networks
with attention on a CPU, which round by the number of threads: a code with a runner-up that is as
good to about 1e-6 may be the other one.
"""
