"""Reading everything there is in a folder of shards, and naming everything that is wrong with it.

Training checks what it can afford: that a tar belongs to its index, and the bytes of each document
it reads. Here every byte is hashed and every document taken apart, and nothing is trusted for
having a matching checksum: a program that writes shards with a mistake in them writes the checksum
of the mistake.

:mod:`~emu35.data.validate.problem` is what is reported, :mod:`~emu35.data.validate.layout` walks a
tar, :mod:`~emu35.data.validate.document` takes one document apart,
:mod:`~emu35.data.validate.shard` one shard, :mod:`~emu35.data.validate.folder` many of them at a
time.
"""
