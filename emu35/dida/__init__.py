"""Discrete diffusion adaptation: a picture's codes predicted together instead of one by one.

The paper (section 4.3) tells what attends to what and leaves the diffusion itself open; that is
taken from its reference on uniform discrete diffusion with a metric path (URSA, arXiv 2510.24717).

A picture's codes x1 are corrupted along a probability path p_t(x | x1) from noise (t = 0) to x1
itself (t = 1): :mod:`~emu35.dida.path`, its numbers fitted to a codebook in
:mod:`~emu35.dida.fit`, times drawn in :mod:`~emu35.dida.times`. For training, every picture of a
packed row gets a noisy copy behind the row (:mod:`~emu35.dida.layout`), which sees the clean tokens
before its picture, and itself in both directions; clean tokens never see a copy. The network is
told no time, so copies at different times share a forward. Some documents lose their prompt
(:mod:`~emu35.dida.drop`), for guidance.

Suffixes: N tokens, K states of a code (the codebook, and a mask where the path has one), D
embedding size, B rows of a batch, S tokens of a row, C clean ones among them.
"""
