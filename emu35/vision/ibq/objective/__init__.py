"""What the tokenizer learns beyond pixels and quantization, term by term (paper section 5.2).

``perceptual`` compares deep features of pictures and reconstructions (LPIPS, or a proxy that is
named as one). ``adversarial`` holds a PatchGAN (``discriminator``, with the cross-rank
``batch_norm``) and what it and the tokenizer learn from each other. ``distillation`` lets decoder
features predict those of a frozen ``teacher``. Codebook entropy belongs to the quantizer.

Each term is a mean over pictures, so that a global batch may be cut into micro-batches and ranks of
equal size; frozen networks run in fp32 whatever the precision of the tokenizer. Nothing here knows
of optimizers or steps except the schedule of the adversarial term.

Legend of shape suffixes: B pictures, C channels, H and W rows and columns.
"""
