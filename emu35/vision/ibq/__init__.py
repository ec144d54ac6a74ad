"""IBQ, the image tokenizer of Emu3.5 (paper section 2.3; index backpropagation, arXiv 2412.02692).

``blocks`` holds the VQGAN encoder and decoder; ``quantizer`` maps latent vectors to codes by the
largest dot product and lets gradients reach the whole codebook (``propagation`` is its kernel,
chunked over the codebook, ``entropy`` the term that spreads codes over it, ``nearest`` the search
alone); ``model`` joins the three under the parameter names of the official release. ``losses`` is
the training objective and nothing else, so that perceptual, adversarial, entropy and distillation
terms can be added without touching the network. ``ema`` averages weights; ``folder`` writes and
reads the release folder (``config.yaml``, ``model.ckpt``); ``codec`` is the tokenizer as the rest
of emu35 uses it.

Legend of shape suffixes: B pictures, C channels, H and W rows and columns, D embedding dimension,
K codebook entries, N = B * H * W latent vectors.
"""
