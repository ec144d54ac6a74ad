"""How good pictures are that were decoded in parallel, against steps and time: ``stage=dida_eval``.

The same prompts, each of which names a scene exactly, are drawn token by token, again with another
seed, and in parallel in several numbers of steps. Every picture is read back and compared with its
scene (:mod:`emu35.data.scenes.quality`), and each decoder's pictures together are compared with
those drawn token by token (:mod:`emu35.vision.frechet`), for which the second seed is the floor:
nobody can be nearer to the first. Beside that stands the loss of codes in noisy copies of held-out
pictures by time, the very quantity that training lowers.

    decoders.py   draws prompts with an engine and judges the pictures; for anyone's use
    rows.py       what is done is not done again: a file a decoder, and one a loss
    held_out.py   losses of noisy copies by time
    report.py     evaluation.json, table.md, evaluation.html and samples
    inputs.py     what is missing, told before anything is loaded
    stage.py      the assembly

A decoder's row tells the forwards that its pictures took (at most steps + 1 in parallel: one reads
the prompt), the tokens that were fed for each, both streams of guidance together, and wall time
within a batch of so many, without the image tokenizer.
"""
