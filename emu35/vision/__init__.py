"""Pictures in, codes out, and back: everything between image files and the visual vocabulary.

A picture enters through :mod:`emu35.vision.resize`, which opens it defensively, chooses a size that
is a multiple of the downsampling factor, and turns it into pixels in [-1, 1]. An
:class:`~emu35.vision.codec.ImageCodec` maps such pixels to a grid of integer codes and codes back
to pixels; the rest of emu35 knows tokenizers only through that protocol. ``ibq/`` is the codec that
emu35 trains: the network, the quantizer, and the folders it is kept in. A folder can also name a
codec of another package (:mod:`emu35.vision.plugged`).
:mod:`emu35.vision.pictures` serves pictures to the stage that trains a tokenizer.
:mod:`emu35.vision.lpips` is the perceptual distance that training minimises and that rewards and
metrics report; ``lpips_fetch`` gets its weights.

Pixel tensors are ``[B, 3, H, W]`` float32 in [-1, 1] and codes are ``[B, H / factor, W / factor]``
int64, everywhere.
"""
