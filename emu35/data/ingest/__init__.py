"""Ingestion: raw records in, token shards out; safe to interrupt at any moment and run again.

Each input file (or folder read as a whole) is one unit of work. Its shards are written to a
staging folder and moved into place together when the input is finished; only then does the
manifest name the input as done. Running the same command again skips inputs that are done and
starts the one that was interrupted from its beginning. The manifest also keeps the options, and a
rerun with others is refused rather than mixed in. A rerun also looks at the shards of inputs that
are done, and does an input again if one of its shards is gone or damaged.

Starting over (``--replace``) leaves the earlier shards in place until the first new ones are ready.

Several workers (:mod:`~emu35.data.ingest.workers`) read and encode inputs side by side and leave
what they made in files. One process writes the shards from these, in the order of the inputs, so
that they are the same for any number of workers and that what repeats an earlier document
(:mod:`~emu35.data.ingest.seen`) is decided in one place. What was encoded ahead of an interruption
is not encoded again.

What inputs are made into is a product (:mod:`~emu35.data.ingest.product`): documents in token
shards here, codes alone in :mod:`emu35.data.codes`. Reading, encoding, workers, books and resuming
(:mod:`~emu35.data.ingest.job`) are the same for both.

A record that cannot be used is written to ``rejects.jsonl`` with its reason and counted. An input
of which more than ``max_rejects`` was rejected is not committed: the run goes on with the other
inputs, keeps theirs, and fails at the end naming the bad ones.
"""
