"""Generation: prompts to text and pictures, from a run folder or a release folder alike.

::

    options.py      what a call may set          records.py     the same from lines of a JSONL file
    run.py          assemble, step, write        references.py  images to codes
    interactive.py  a dialogue in the terminal   memory.py      how large a cache fits
    files.py        what is left on disk         show.py        what a person sees meanwhile
    earlier.py      what an earlier call left

Everything that can be wrong with a call is checked before weights are read, and all of it is
reported together. What is finished is written at once, each file whole or not at all, so a call
that is interrupted or killed keeps what it has made::

    OUT/index.html         one page of all answers
        results.jsonl      one row a prompt: ids, seed, sizes, files, what was cut short
        000_prompt.txt     000_reference_image.png ...
        000_text.txt       000_00_image.png  000_01_image.png ...
        000_story.pb       the same as emu3p5.story, which the official viewer reads

The same seed gives the same tokens whatever the batch size: every prompt has a random generator of
its own, seeded by (seed, index of the prompt), or by the seed that its record names.
"""
