"""Random documents that the tests of shards, plans and loaders share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from emu35.tokens.document import Image, Part, Text

CODEBOOK = 64

WriteSource = Callable[..., Path]


def random_documents(count: int, *, seed: int, longest: int = 60) -> list[list[Part]]:
    """Documents of text and small pictures in random order."""
    rng = np.random.default_rng(seed)
    documents: list[list[Part]] = []
    for number in range(count):
        text = Text(f"{number} " + "x" * int(rng.integers(1, longest)))
        rows, columns = rng.integers(1, 5, size=2)
        picture = Image(rng.integers(0, CODEBOOK, size=(rows, columns)))
        kinds: list[list[Part]] = [[text], [text, picture], [picture, text], [text, picture, text]]
        documents.append(kinds[int(rng.integers(0, 4))])
    return documents
