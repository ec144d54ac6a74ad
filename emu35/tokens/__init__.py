"""Between people's text and pictures on one side and one stream of integer ids on the other.

A vocabulary has three stretches, in this order, and :mod:`~emu35.tokens.vocabulary` is the only
place that knows where each begins::

    0 .. n_text-1        text       151,643 Qwen byte-pair ids, or the 256 bytes
    n_text .. +210       specials   padding, document and chain-of-thought marks, image layout
    n_text+211 ..        visual     one id per entry of the image tokenizer's codebook

Data flows one way for training and the other way after generation::

    str ---- text ---->  ids                      text.py (table.py finds and checks the table)
    Text | Image | ... -> Document -> TokenSequence        document.py, serialize.py
    task + question -----------------> Prompt              template.py
    ids --------- serialize.deserialize ----------> Document
    generated Document -----------> Answer: thoughts, text, images       answer.py

Everything a released Emu3.5 must agree on byte for byte (special ids, the image grid, prompts,
tokenizer files) is here and is tested against values that the official code produced.

One rule protects every stage above: *text never becomes a special token*. ``encode`` reads
``<|image start|>`` in a caption as fifteen harmless characters; only the serializer and the
templates place specials. The official tokenizer parses them, so ``allow_special=True`` exists for
comparing with it and for text that was written by us.

The special strings are matched by one small regular expression of our own instead of tiktoken's
alternation over 131,283 of them: with those, building the encoder takes 4 s and *every* call 80 ms;
without, 0.2 s and microseconds. The ids are the same.

Nothing here imports torch, and importing the package reads no file.
"""
