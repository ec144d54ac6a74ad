"""Numbers that say whether a picture is worth training on.

A :class:`PictureScorer` looks at pixels. :mod:`.proxies` has those that are always there: classical
statistics, named proxies because they know nothing of content. :mod:`.classifier` runs a model from
a local file: a watermark detector, a judge of quality. Whoever has another way implements the
protocol and hands it to :class:`~emu35.vision.pictures.readers.PixelReader`.

Scores cost one decoding of every picture, once: :mod:`emu35.vision.pictures.columns` keeps them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""RGB [H, W, 3]."""


class PictureScorer(Protocol):
    """Gives every picture a number; what is higher, sharper or more likely marked, it says
    itself."""

    @property
    def name(self) -> str:
        """What filters and messages call it."""
        ...

    @property
    def identity(self) -> str:
        """What scores depend on, in words: another identity, and kept scores are not used."""
        ...

    @property
    def side(self) -> int:
        """Shorter side in pixels to which pictures are resized before they are scored; the longer
        is at most twice that."""
        ...

    def score(self, pictures: Sequence[Picture]) -> NDArray[np.float64]:
        """A finite number for each of ``pictures``, or NaN where there is none."""
        ...
