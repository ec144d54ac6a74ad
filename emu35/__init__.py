"""emu35: an open training framework for Emu3.5-class multimodal models (arXiv 2510.26583)."""

__version__ = "0.1.0"
