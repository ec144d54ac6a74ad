"""Self-distillation: the model's own answers to a set of prompts, as token shards to train on.

::

    options.py   what a call may set, and what of it a rerun must repeat
    prompts.py   the prompts of this job, checked, and cut into stretches
    judge.py     answers to documents: which are whole, what they are worth, which are kept
    work.py      stretches in flight: requests out, answers in
    job.py       assemble and step
    run.py       commit what is kept, as shards
    rates.py     the same answers, for how often they pass: ``emu35 data filter-prompts``

Every prompt is answered ``samples`` times. What is kept becomes the document that ``emu35 data
ingest`` would make of the same task record with a picture of these codes: the question in the form
of its task, the answer with its codes as generated, never decoded and encoded again. ``stage=sft``
and ``stage=dida`` read the shards as any other.

A stretch of ``prompts_per_shard`` prompts is a unit of work, as an input file is one of ingestion:
its shards are moved into place together, and the books (:mod:`emu35.data.ingest.manifest`) then
name it as done. An interrupted run goes on behind the last such stretch and leaves what an
uninterrupted one leaves: a sample's seed follows from the call's seed, the prompt's place in the
file and the sample's number alone, and its tokens do not depend on what else is in flight (on a
GPU as far as its kernels round alike in batches of other sizes).

Jobs that share a set (``part``) answer neighbouring prompts each and write into one folder, which
is one source to train on: shards ``NAME-2-of-8-000000.tar`` with ``samples-2-of-8.jsonl``, books
and a lock of their own.

Beside the shards ``samples.jsonl`` tells of every sample its seed, its reward, whether it was kept
and if not, why::

    {"id": "prompts.jsonl:1 cat#0", "prompt": 0, "sample": 0, "seed": 123, "finish": "images",
     "pictures": 1, "tokens": 4182, "reward": 0.75, "kept": false, "why": "reward below the least",
     "detail": "0.75 < 0.8"}
"""
