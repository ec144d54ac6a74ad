"""IBQ, the image tokenizer of Emu3.5 (paper section 2.3; index backpropagation, arXiv 2412.02692).

``blocks`` holds the VQGAN encoder and decoder; ``quantizer`` maps latent vectors to codes by the
largest dot product and lets gradients reach the whole codebook (``propagation`` is its kernel,
chunked over the codebook, ``entropy`` the term that spreads codes over it, ``nearest`` the search
alone); ``model`` joins the three under the parameter names of the official release. ``losses``
compares pixels and latent vectors; ``objective/`` has the terms that need a network of their own
(perceptual, adversarial, semantic distillation), of which the tokenizer's knows nothing but to hand
out decoder features. ``ema`` averages weights; ``folder`` writes and reads the release folder
(``config.yaml``, ``model.ckpt``), ``hf_folder`` the same weights as ``config.json`` and
``model.safetensors``, and ``identity`` tells that both are one tokenizer; ``codec`` is the
tokenizer as the rest of emu35 uses it.

Legend of shape suffixes: B pictures, C channels, H and W rows and columns, D embedding dimension,
K codebook entries, N = B * H * W latent vectors.
"""
